"""The runs of `moe_lm.py`: a dense model or one of experts, trained to a step, with checkpoints."""

from __future__ import annotations

import json
import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.arm import Arm, bits_per_byte
from experiments.log import Display, Metrics
from experiments.loop import Interrupted, Stop, write_json
from experiments.text import Text, batches, windows
from jaxsparse.checkpoint import Checkpointer
from models import moe, transformer
from models.flops import training_flops

WARMUP = 20  # steps
BATCH = 64  # windows of a batch that is only measured


class Plan(NamedTuple):
    """What decides a run beside the model and where it starts.

    Attributes:
        seed: Of weights and data.
        steps: To make.
        first: Step number of the data it begins with; a run that goes on sees new text.
        decay: Lower the rate to a tenth over the last fifth of the steps.
        marks: Steps after which held-out text is measured, beside the last.
    """

    seed: int
    steps: int
    first: int = 0
    decay: bool = True
    marks: tuple[int, ...] = ()

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, from zero."""
        left = (self.steps - step) / max(1.0, 0.2 * self.steps)
        return min(1.0, (step + 1) / WARMUP) * (min(1.0, max(0.1, left)) if self.decay else 1.0)


class Trained(NamedTuple):
    """The content of result.json, and parameters and optimizer after the last step."""

    result: dict[str, Any]
    params: Any
    state: Any


def make_model(config: transformer.Config, rngs: nnx.Rngs) -> Any:
    """The transformer of a config, of experts if that is one of experts."""
    kind = moe.MoETransformer if isinstance(config, moe.Config) else transformer.Transformer
    return kind(config, rngs=rngs)


@lru_cache
def make_arm(config: transformer.Config, learning_rate: float) -> Arm:
    """Init, train step and loss of a model, compiled once for all seeds and starts.

    `init` takes the seed, and `step` the factor of the learning rate, 1 if not given. The rate of
    the matrices is learning_rate * 64 / width; that of embedding and norms four times
    learning_rate, at any width.
    """
    model = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise ValueError("a router with a state needs a loop that moves it; this one does not.")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.01),
    )

    def factor(path: Any, update: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        small = "embedding" in name or "norm" in name
        return -learning_rate * (4.0 if small else 64.0 / config.width) * update

    @jax.jit
    def init(seed):
        params = nnx.split(make_model(config, nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)[1]
        return params, tx.init(params)

    def nats_of(params, tokens):
        out = nnx.merge(graph, params, rest)(tokens[:, :-1])
        logits, aux = (out[0], out[1].aux.sum()) if isinstance(out, tuple) else (out, 0.0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), aux

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, rate=1.0):
        def loss(params):
            nats, aux = nats_of(params, tokens)
            return nats.mean() + aux, nats.mean()

        gradient, value = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        updates = jax.tree_util.tree_map_with_path(lambda p, u: rate * factor(p, u), updates)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def nats(params, state, tokens, weights):
        return (nats_of(params, tokens)[0] * weights).sum(), weights.sum()

    wrapped = optax.with_extra_args_support(tx)
    return Arm("", graph, wrapped, init, step, nats, lambda params, state: params, None)


def parameters(config: transformer.Config, *, blocks: bool = False) -> int:
    """How many a model has; with `blocks` without embedding, head and last norm."""
    model = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    part = model.layers if blocks else model
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))


def flops(config: transformer.Config) -> float:
    """Training FLOPs of a token, those of a linear router included."""
    if not isinstance(config, moe.Config):
        return sum(training_flops(config).values())
    router = 6.0 * config.width * config.experts * config.layers if config.experts > 1 else 0.0
    return sum(training_flops(config.active).values()) + router


def held_out(text: Text, context: int, limit: int) -> list[Any]:
    """Windows to measure on, evenly spread over the held-out text."""
    return list(windows(text.valid, context=context, batch=min(BATCH, limit), limit=limit))


def train(
    config: transformer.Config,
    plan: Plan,
    text: Text,
    out: Path,
    console: Any,
    *,
    learning_rate: float,
    batch: int,
    limit: int,
    begin: Any = None,
    start: str = "random",
) -> Trained:
    """Train a model as planned, from its last checkpoint in `out` if there is one.

    Args:
        config: The model.
        plan: Seed, steps, data.
        text: To learn and to measure on.
        out: Gets metrics.jsonl, checkpoints/ and result.json.
        console: For the progress bar.
        learning_rate: See `make_arm`.
        batch: Windows of a step.
        limit: Held-out windows measured.
        begin: () -> parameters and optimizer at step 0, if not random.
        start: What `begin` is, in words; it is part of what decides the run.

    Raises:
        Interrupted: Stopped by Ctrl-C or SIGTERM; a checkpoint is saved.
        FloatingPointError: The loss is not finite.
        ValueError: `out` has a run of other options.
    """
    about = {
        "plan": plan._asdict() | {"marks": list(plan.marks)},
        "model": repr({k: v for k, v in vars(config).items() if k not in ("router", "gate")}),
        "start": start,
        "learning_rate": learning_rate,
        "batch": batch,
        "limit": limit,
        "text": text.digest,
    }
    arm, finished = make_arm(config, learning_rate), out / "result.json"
    measured = held_out(text, config.context, limit)
    data = batches(text.train, context=config.context, batch=batch, seed=plan.seed)
    out.mkdir(parents=True, exist_ok=True)
    with Stop() as stop, _open(out / "checkpoints", about) as checkpoints:
        fresh = partial(arm.init, plan.seed)
        restored = checkpoints.restore(*jax.eval_shape(fresh))
        if restored is None:
            done, (params, state) = 0, (fresh() if begin is None else begin())
        else:
            done, params, state = restored[:3]
        if done == plan.steps and finished.exists():
            return Trained(json.loads(finished.read_text()), params, state)
        name, tokens = out.name, batch * config.context
        with (
            Metrics(out / "metrics.jsonl", done=done) as metrics,
            Display(console, name, total=plan.steps, done=done, tokens=tokens) as display,
        ):
            while done < plan.steps:
                at = jnp.asarray(data[plan.first + done])
                rate = jnp.asarray(plan.rate(done), jnp.float32)
                params, state, loss = arm.step(params, state, at, rate)
                done += 1
                last = done == plan.steps
                if last or done in plan.marks or done % 10 == 0:
                    record = {"step": done, "loss": float(loss)}
                    if not math.isfinite(record["loss"]):
                        raise FloatingPointError(
                            f"the loss of {name} is not finite at step {done}. Lower "
                            f"--learning-rate ({learning_rate})."
                        )
                    if last or done in plan.marks:
                        record["valid_bits_per_byte"] = bits_per_byte(arm, params, state, measured)
                    metrics.write(record)
                    display.loss(record["loss"])
                if last or done in plan.marks or stop.asked:
                    checkpoints.save(done, params=params, opt_state=state)
                if stop.asked and not last:
                    checkpoints.wait()
                    raise Interrupted(done)
                display.step(done)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "valid_bits_per_byte" in record]
    result = {
        "marks": [[r["step"], r["valid_bits_per_byte"]] for r in records],
        "bits_per_byte": records[-1]["valid_bits_per_byte"],
        "tokens": plan.steps * tokens,
        "flops": plan.steps * tokens * flops(config),
        "parameters": parameters(config),
    }
    write_json(finished, result)
    return Trained(result, params, state)


def _open(directory: Path, about: dict[str, Any]) -> Checkpointer:
    try:
        return Checkpointer(directory, config=about, keep=1)
    except ValueError as error:
        raise ValueError(f"{error} That is: another --out.") from None
