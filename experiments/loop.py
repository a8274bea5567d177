"""The training loop: resumes exactly, stops cleanly, and leaves metrics and checkpoints."""

from __future__ import annotations

import json
import math
import signal
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.arm import Arm, bits_per_byte, by_layer
from experiments.log import Display, Metrics
from experiments.options import Options, identity, learning_rate, model_config
from experiments.text import Text, batches, windows
from jaxsparse.checkpoint import Checkpointer
from models.flops import parameter_shapes

CHECKED = 16_384  # held-out bytes of a validation on the way; the last one takes them all


class Interrupted(Exception):
    """The run was asked to stop and has saved `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Stop:
    """While open, Ctrl-C and SIGTERM set `asked`; a second Ctrl-C raises KeyboardInterrupt."""

    def __enter__(self) -> Stop:
        self.asked = False
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Trained(NamedTuple):
    """What `train` returns: the content of result.json, and the state after the last step."""

    result: dict[str, Any]
    params: Any
    state: Any
    resumed: bool  # nothing was trained: the run had been finished before


def train(arm: Arm, options: Options, text: Text, out: Path, console: Console) -> Trained:
    """Train an arm to its last step, from the last checkpoint in `out` if there is one.

    A step is a function of params, optimizer state and step number, and so are batches, learning
    rate and masks: on the same machine and versions, a run that was killed and goes on has the
    losses, bit for bit, of one that was not.

    Args:
        arm: what to train.
        options: of the run.
        text: what to learn and to validate on.
        out: gets metrics.jsonl, checkpoints/ and result.json.
        console: for the progress bar.

    Raises:
        Interrupted: stopped by Ctrl-C or SIGTERM; a checkpoint of the last step is saved.
        FloatingPointError: the loss is not finite any more.
        ValueError: `out` has a run of other options.
    """
    about = {"arm": arm.name, **identity(options, text.digest, arm.name)}
    total, context = options.training.steps, model_config(options).context
    finished = out / "result.json"
    with Stop() as stop, _open(out / "checkpoints", about) as checkpoints:
        with console.status("preparing the model"):
            done, params, state = _start(arm, checkpoints, console)
        if done == total and finished.exists():
            return Trained(json.loads(finished.read_text()), params, state, True)
        tokens = options.training.batch * context
        with (
            Metrics(out / "metrics.jsonl", done=done) as metrics,
            Display(console, arm.name, total=total, done=done, tokens=tokens) as display,
        ):
            run = _Run(arm, options, text, metrics, display)
            while done < total:
                params, state = run.step(done, params, state)
                done += 1
                if done % options.output.checkpoint_every == 0 or done == total or stop.asked:
                    masks = None if arm.masks is None else arm.masks(state)
                    checkpoints.save(done, params=params, opt_state=state, masks=masks)
                if stop.asked and done < total:
                    checkpoints.wait()
                    raise Interrupted(done)
            display.say(f"{arm.name}: measuring on all held-out text")
            bits = bits_per_byte(arm, params, state, windows(text.valid, **_measured(options)))
    result = {
        "steps": total,
        "tokens": total * tokens,
        "valid_bits_per_byte": bits,
        "valid_loss": bits * math.log(2),
        "tokens_per_second": display.rate,
    }
    write_json(finished, result)
    return Trained(result, params, state, False)


def _open(directory: Path, about: dict[str, Any]) -> Checkpointer:
    try:
        return Checkpointer(directory, config=about)
    except ValueError as error:
        raise ValueError(f"{error} That is: another --out, or --fresh.") from None


def _start(arm: Arm, checkpoints: Checkpointer, console: Console) -> tuple[int, Any, Any]:
    """(steps done, params, opt_state) of the last checkpoint, or of a new run."""
    with warnings.catch_warnings(record=True) as notes:  # a save that a kill cut off
        warnings.simplefilter("always", UserWarning)
        restored = checkpoints.restore(*jax.eval_shape(arm.init))
    for note in notes:
        console.print(f"note: {note.message}", highlight=False, markup=False, soft_wrap=True)
    if restored is None:
        return 0, *arm.init()
    return restored.step, restored.params, restored.opt_state


class _Run:
    """One step of training with all that is measured around it."""

    def __init__(
        self, arm: Arm, options: Options, text: Text, metrics: Metrics, display: Display
    ) -> None:
        self.arm, self.options, self.text = arm, options, text
        self.metrics, self.display = metrics, display
        context, t = model_config(options).context, options.training
        self.data = batches(text.train, context=context, batch=t.batch, seed=t.seed)
        self.rate = jax.jit(learning_rate(options.training))
        self.sizes = parameter_shapes(model_config(options))
        for record in metrics.before[-1:]:
            self.show_sparsity(record)

    def show_sparsity(self, record: dict[str, Any]) -> None:
        """Show the share of weights that is removed in all matrices with masks."""
        sizes = {path: math.prod(self.sizes[path]) for path in record["sparsity"]}
        layers = record["sparsity"].items()
        removed = sum(sizes[path] * sum(x) / len(x) for path, x in layers)
        self.display.sparsity = removed / sum(sizes.values())

    def step(self, done: int, params: Any, state: Any) -> tuple[Any, Any]:
        """Make step number `done` (from zero); what is recorded depends on that number alone."""
        arm, output, every = self.arm, self.options.output, self.options.sparse.every
        watched = arm.masks is not None and done % every == 0  # masks may change in this step
        before = arm.masks(state) if watched else None
        params, state, loss = arm.step(params, state, jnp.asarray(self.data[done]))
        record: dict[str, Any] = {}
        if watched:
            layers = by_layer(before, arm.masks(state))
            record["sparsity"] = {path: _floats(x[0]) for path, x in layers.items()}
            record["churn"] = {path: _floats(x[1]) for path, x in layers.items()}
            self.show_sparsity(record)
        if done == 0 or (done + 1) % output.validate_every == 0:
            shape = _measured(self.options)
            some = windows(self.text.valid, limit=CHECKED // shape["context"], **shape)
            record["valid_bits_per_byte"] = bits_per_byte(arm, params, state, some)
        last = done + 1 == self.options.training.steps
        if record or last or (done + 1) % output.log_every == 0:
            value = float(loss)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at step {done + 1}. Lower --learning-rate "
                    f"({self.options.training.learning_rate}) or raise --warmup."
                )
            rate = float(self.rate(done))
            record = {"step": done + 1, "loss": value, "learning_rate": rate} | record
            self.metrics.write(record)
            self.display.loss(value)
        self.display.step(done + 1)
        return params, state


def _measured(options: Options) -> dict[str, int]:
    """Shape of the batches in a validation: at least 4096 bytes."""
    context = model_config(options).context
    return {"context": context, "batch": max(options.training.batch, 4096 // context)}


def _floats(values: Any) -> list[float]:
    return [float(x) for x in values]


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
