"""Dense, window, S2 and native sparse attention: recall over a distance, text, FLOPs, step time.

`python -m experiments.long_context --help` for the options. Each model is trained twice: on
associative recall (`experiments/recall.py`), from short contexts to the full one, and on text.
A run that is finished is not run again, and one that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from experiments.allocator import keep_freed_memory
from experiments.arm import Arm
from experiments.log import Display, Metrics, make_console
from experiments.long_context_options import Options, identity, model_config, plan
from experiments.long_context_report import write_report
from experiments.loop import Interrupted, Stop, write_json
from experiments.recall import Recall
from experiments.table import step_seconds
from experiments.text import batches, load, windows
from jaxsparse.checkpoint import Checkpointer
from models.flops import parameter_count, training_flops
from models.transformer import Dense, Transformer

TASKS = ("recall", "text")
FASTER = ("embedding", "norm", "compress")  # what is no matrix takes ten times the learning rate


@lru_cache
def make_arm(options: Options, arm: str, task: str) -> Arm:
    """The model and its jitted functions, compiled once for all seeds.

    Tokens are [B, 2, T]: inputs, and targets or -1. `init` takes the seed, and `nats` gives the
    sum, the number of targets, and which were met.
    """
    make = partial(Transformer, model_config(options, arm, task))
    graph = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]
    steps = sum(count for _, count in plan(options, task))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, max(1, steps // 10), steps + 1, options.learning_rate / 10
    )

    def faster(path: Any, update: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return 10 * update if any(part in name for part in FASTER) else update

    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=0.01),
        optax.stateless(lambda u, _: jax.tree_util.tree_map_with_path(faster, u)),
    )

    @jax.jit
    def init(seed):
        params = nnx.split(make(rngs=nnx.Rngs(jax.random.key(seed))))[1]
        return params, tx.init(params)

    def measure(params, tokens):
        inputs, targets = tokens[:, 0], tokens[:, 1]
        logits = nnx.merge(graph, params)(inputs)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        asked = targets >= 0
        return (nats * asked).sum(), asked.sum(), (logits.argmax(-1) == targets) & asked

    @jax.jit
    def step(params, state, tokens):
        def mean(params):
            nats, count, _ = measure(params, tokens)
            return nats / count

        value, gradient = jax.value_and_grad(mean)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    nats = jax.jit(lambda params, state, tokens, weights: measure(params, tokens))
    return Arm(arm, graph, optax.with_extra_args_support(tx), init, step, nats, _itself, None)


def _itself(params: Any, state: Any) -> Any:
    del state
    return params


class Data:
    """Batches [B, 2, T] of a task: `batch(step, context)` depends on seed and step alone."""

    def __init__(self, options: Options, task: str, seed: int) -> None:
        self.options, self.task, self.seed = options, task, seed
        if task == "text":
            self.text = load(options.data, context=options.context)
            size = max(1, options.tokens // options.context)
            self.windows = batches(self.text.train, context=options.context, batch=size, seed=seed)

    def batch(self, step: int, context: int) -> np.ndarray:
        """What step number `step` (from zero) learns."""
        if self.task == "text":
            tokens = self.windows[step]
            return np.stack([tokens[:, :-1], tokens[:, 1:]], 1)
        size = max(1, self.options.tokens // context)
        problem = Recall().problem(context, size, seed=self.seed, step=step)
        return np.stack([problem.tokens, problem.targets], 1)


def evaluate(run: Arm, params: Any, data: Data, batches_: int = 32) -> dict[str, Any]:
    """Recall and its distances, or bits per byte, on data that was not trained on."""
    options, context = data.options, data.options.context
    size = max(1, options.tokens // context)
    if data.task == "text":
        total = count = 0.0
        parts = windows(data.text.valid, context=context, batch=size, limit=batches_ * size)
        for tokens, weights in parts:
            targets = np.where(weights > 0, tokens[:, 1:], -1)
            pair = jnp.asarray(np.stack([tokens[:, :-1], targets], 1))
            nats, number, _ = run.nats(params, None, pair, None)
            total, count = total + float(nats), count + float(number)
        return {"bits_per_byte": total / count / float(np.log(2))}
    right, distance = [], []
    for step in range(batches_):
        problem = Recall().problem(context, size, seed=2**31 + data.seed, step=step)
        pair = jnp.asarray(np.stack([problem.tokens, problem.targets], 1))
        hits = np.asarray(run.nats(params, None, pair, None)[2])
        right.append(hits[problem.targets >= 0].ravel())
        distance.append(problem.distance.ravel())
    hits, far = np.concatenate(right), np.concatenate(distance)
    edges = np.linspace(0, context, 13)
    where = np.clip(np.digitize(far, edges) - 1, 0, 11)
    bins = [float(hits[where == i].mean()) if np.any(where == i) else None for i in range(12)]
    return {"recall": float(hits.mean()), "by_distance": bins}


def train(options: Options, arm: str, task: str, seed: int, out: Path, console: Any) -> dict:
    """Train and measure one model, or read what it gave before."""
    about = {"arm": arm, "task": task, "seed": seed, **identity(options, task)}
    finished = out / "result.json"
    if finished.exists():
        found = json.loads(finished.read_text())
        if found["about"] == about:
            return found
        raise ValueError(f"{out} has a run of other options. Choose another --out.")
    run, data = make_arm(options, arm, task), Data(options, task, seed)
    contexts = [context for context, steps in plan(options, task) for _ in range(steps)]
    out.mkdir(parents=True, exist_ok=True)
    with Stop() as stop, Checkpointer(out / "checkpoints", config=about, keep=1) as checkpoints:
        restored = checkpoints.restore(*jax.eval_shape(run.init, seed))
        done, params, state = (0, *run.init(seed)) if restored is None else restored[:3]
        name = f"{task} {arm} {seed}"
        size = options.tokens
        with (
            Metrics(out / "metrics.jsonl", done=done) as metrics,
            Display(console, name, total=len(contexts), done=done, tokens=size) as display,
        ):
            while done < len(contexts):
                tokens = jnp.asarray(data.batch(done, contexts[done]))
                params, state, loss = run.step(params, state, tokens)
                done += 1
                last = done == len(contexts) or stop.asked
                if done % options.every == 0 or last:
                    value = float(loss)
                    metrics.write({"step": done, "loss": value, "context": contexts[done - 1]})
                    display.loss(value)
                    checkpoints.save(done, params=params, opt_state=state)
                if stop.asked and done < len(contexts):
                    checkpoints.wait()
                    raise Interrupted(done)
                display.step(done)
    result = {"about": about, **evaluate(run, params, data)}
    write_json(finished, result)
    return result


def costs(options: Options) -> dict[str, dict[str, float]]:
    """Of each arm: attention FLOPs and all FLOPs of a training token, parameters, step time."""
    found, runs = {}, {}
    tokens = Data(options, "recall", 0).batch(0, options.context)
    for arm in options.arms:
        config = model_config(options, arm, "recall")
        flops = training_flops(config)
        dense = training_flops(dataclasses.replace(config, attention=Dense()))["attention"]
        found[arm] = {
            "attention_flops": flops["attention"],
            "density": flops["attention"] / dense,
            "flops": sum(flops.values()),
            "parameters": parameter_count(config),
        }
        run = make_arm(options, arm, "recall")
        runs[arm] = (run, *run.init(0))
    for arm, seconds in step_seconds(runs, tokens, rounds=5).items():
        found[arm]["step_ms"] = 1e3 * seconds
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done yet; returns the exit status."""
    console = make_console()
    try:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.long_context")
        found: dict[str, Any] = {"context": options.context, "chance": 1 / Recall().values}
        for task in TASKS:
            found[task] = {
                arm: [
                    train(options, arm, task, seed, options.out / task / f"{arm}-{seed}", console)
                    for seed in range(options.seeds)
                ]
                for arm in options.arms
            }
        console.print("measuring the time of a step, all kinds in turns")
        found["costs"] = costs(options)
    except Interrupted as stop:
        console.print(f"Stopped after step {stop.step}; the same command goes on from there.")
        return 130
    except ValueError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    found["settings"] = {
        **identity(options, "recall"),
        **identity(options, "text"),
        "seeds": options.seeds,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "python": platform.python_version(),
        "jax": version("jax"),
        "date": datetime.date.today().isoformat(),
    }
    write_json(options.out / "summary.json", found)
    console.print(write_report(options.out, found), markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sys.exit(main())
