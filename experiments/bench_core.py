"""What sparse training costs over dense training: ratios to a dense Adam step, in one run.

An MLP of 9.2M parameters (784-1024x9-10, batch 128, float32). A dense and a sparse step take turns;
each figure is the median over rounds of sparse / dense within a round, so that a machine whose
speed drifts does not change it. No third one is alive: its state would take cache and huge pages
that a single training run has. "Amortised" is computed from the two measured ratios before it.

    python -m experiments.bench_core [--rounds 15] [--out experiments/results/bench_core.json]

Allocator: a step allocates its temporaries anew each time. glibc hands blocks over 32 MB back to
the system at once, and touching fresh pages then costs a fault for every 4 KiB. A sparse step
crosses that size, because no leaf may change before all gradients are known to be finite; so on
Linux the script starts again with GLIBC_TUNABLES that keep blocks and use huge pages, for dense and
sparse steps alike. `--no-tuned-allocator` measures the defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import jaxsparse as jsp
from experiments.allocator import keep_freed_memory

SIZES = (784, *[1024] * 9, 10)
BATCH = 128
SEEDS = 4
Step = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    rounds: int = 15
    """Rounds; each runs every step once."""
    out: Path | None = None
    """Where to write the figures as JSON."""
    tuned_allocator: bool = True
    """Start again with GLIBC_TUNABLES that keep large blocks (Linux)."""
    only: str = ""
    """Run only rows whose name contains this."""


def init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Parameters with He-scaled weights."""
    params = {}
    for i, (k, n) in enumerate(zip(SIZES[:-1], SIZES[1:], strict=True)):
        noise = jax.random.normal(jax.random.fold_in(key, i), (k, n))
        params[f"layer_{i}"] = {"kernel": noise * (2 / k) ** 0.5, "bias": jnp.zeros(n)}
    return params


def loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of the MLP."""
    for i in range(len(SIZES) - 1):
        layer = params[f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(SIZES) - 2 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


class Runner:
    """One way to train: a donated, compiled step and its state."""

    def __init__(self, updater: jsp.MaskUpdater | None, *, packed: bool = False, seeds: int = 0):
        tx = optax.adam(1e-3)
        if updater is not None:
            tx = jsp.sparsify(tx, updater, packed=packed)
        view = updater.view if updater is not None else lambda params, state: params

        def step(params: Any, state: Any, x: jax.Array, labels: jax.Array) -> Any:
            def seen(params: Any) -> jax.Array:
                return loss(view(params, getattr(state, "updater", None)), x, labels)

            grads = jax.grad(seen)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        key = jax.random.key(0)
        self.x = jax.random.normal(key, (BATCH, SIZES[0]))
        self.labels = jax.random.randint(key, (BATCH,), 0, SIZES[-1])
        if seeds:
            step = jax.vmap(step, (0, 0, None, None))
            keys = jax.random.split(key, seeds)
            params = jax.jit(jax.vmap(init))(keys)
            state = jax.jit(jax.vmap(tx.init))(params)
        else:
            params = jax.jit(init)(key)
            state = jax.jit(tx.init)(params)
        self.values = params, state
        self.step: Step = jax.jit(step, donate_argnums=(0, 1))
        for _ in range(2):
            self()

    def __call__(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self.values = self.step(*self.values, self.x, self.labels)
        jax.block_until_ready(self.values)
        return time.perf_counter() - begin


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    pairs = zip(times[name], times[base], strict=True)
    return statistics.median(a / b for a, b in pairs)


def updaters(when: Callable[[jax.Array], jax.Array]) -> dict[str, jsp.MaskUpdater]:
    """The algorithms, with masks that move when `when` says."""
    key, plan = jax.random.key(1), jsp.uniform(0.9)
    return {
        "static": jsp.static(plan, key=key),
        "gradual": jsp.gradual(plan, schedule=jsp.linear(0, 1_000_000), when=when),
        "set": jsp.set_(plan, key=key, when=when),
        "rigl": jsp.rigl(plan, key=key, when=when),
    }


QUIET_LIMIT = {"static": 1.03}
UPDATE_LIMIT = {"gradual": 3.2, "rigl": 3.2, "set": 3.8}
AMORTISED_LIMIT = {"static": 1.07}


def selections(rounds: int) -> dict[str, float]:
    """Time of `make_mask` over all weights, as a share of a stable argsort of the same scores."""
    params = jax.jit(init)(jax.random.key(0))
    weights = [jnp.abs(layer["kernel"]) for layer in params.values()]
    forms = {
        "argsort": lambda w: jnp.argsort(w.reshape(-1), stable=True),
        "Unstructured": lambda w: jsp.make_mask(jsp.Unstructured(), w, 0.1),
        "FanIn": lambda w: jsp.make_mask(jsp.FanIn(), w, 0.1),
        "NM(2, 4)": lambda w: jsp.make_mask(jsp.NM(2, 4), w, 0.5),
    }
    runs = {}
    for name, form in forms.items():
        compiled = jax.jit(lambda ws, form=form: [form(w) for w in ws])

        def run(compiled: Step = compiled) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(weights))
            return time.perf_counter() - begin

        run()
        runs[name] = run
    times = interleaved(runs, max(3, rounds // 3))
    return {name: ratio(times, name, "argsort") for name in forms if name != "argsort"}


def row(name: str, figure: float, limit: float | None) -> list[str]:
    """A line of the table."""
    verdict = "" if limit is None else "ok" if figure <= limit else "OVER"
    return [name, f"{figure:.4g}", "" if limit is None else f"{limit:.4g}", verdict]


def mask_bits(state: Any) -> float:
    """Bits of mask a weight in the masks of a state."""
    leaves = [m for m in jax.tree.leaves(state.updater.masks) if jnp.ndim(m)]
    weights = sum(m.size for m in jax.tree.leaves(jsp.masks(state)) if jnp.ndim(m))
    return sum(8 * m.nbytes for m in leaves) / weights


def measure(options: Options) -> list[list[str]]:
    """All figures, as rows of name, figure, limit, verdict."""
    rows: list[list[str]] = []
    never, always = jsp.once(2**30), jsp.every(1)

    def wanted(name: str) -> bool:
        return options.only in name

    def compare(
        title: str, made: dict[str, jsp.MaskUpdater], limits: dict[str, float], seeds: int = 0
    ) -> dict[str, float]:
        made = {name: updater for name, updater in made.items() if wanted(f"{title}: {name}")}
        if not made:
            return {}
        dense, ratios, times = Runner(None, seeds=seeds), {}, {}
        for name, updater in made.items():
            run = Runner(updater, packed="packed" in name, seeds=seeds)
            times = interleaved({"dense": dense, name: run}, options.rounds)
            ratios[name] = ratio(times, name, "dense")
            rows.append(row(f"{title}: {name} / dense", ratios[name], limits.get(name)))
            if "packed" in name:
                rows.append(row("packed masks, bits a weight", mask_bits(run.values[1]), 1.0))
        milliseconds = statistics.median(times["dense"]) * 1e3
        rows.append(row(f"{title}: dense, ms", milliseconds, None))
        return ratios

    quiet, moving = updaters(never), updaters(always)
    moving.pop("static")
    limits = dict.fromkeys(quiet, 1.12) | QUIET_LIMIT
    quiet_ratio = compare("quiet step", {**quiet, "rigl, packed": quiet["rigl"]}, limits)
    update_ratio = compare("mask-update step", moving, UPDATE_LIMIT)
    for name in quiet:
        if name in quiet_ratio and (name in update_ratio or name == "static"):
            figure = (99 * quiet_ratio[name] + update_ratio.get(name, quiet_ratio[name])) / 100
            limit = AMORTISED_LIMIT.get(name, 1.14)
            rows.append(row(f"amortised, one update in 100: {name} / dense", figure, limit))
    straight = {
        "2:4": jsp.ste(jsp.uniform(0.5, jsp.NM(2, 4))),
        "unstructured": jsp.ste(jsp.uniform(0.9)),
    }
    compare("straight-through step", straight, {"2:4": 1.25, "unstructured": 2.0})
    compare(f"quiet step under vmap over {SEEDS}", quiet, dict.fromkeys(quiet, 1.15), SEEDS)
    if wanted("make_mask"):
        limits = {"Unstructured": 1 / 25, "FanIn": 1 / 15}
        for name, figure in selections(options.rounds).items():
            rows.append(row(f"make_mask {name} / stable argsort", figure, limits.get(name)))
    return rows


def main(options: Options) -> None:
    """Measure, print the table, and keep it."""
    if options.tuned_allocator:
        keep_freed_memory()
    device = jax.devices()[0]
    setting = {
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "default"),
        "rounds": options.rounds,
    }
    print("\n".join(f"{key}: {value}" for key, value in setting.items()), flush=True)
    rows = measure(options)
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    header = ["measured", "figure", "limit", ""]
    for line in [header, *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    if options.out:
        figures = {name: {"figure": float(f), "limit": limit or None} for name, f, limit, _ in rows}
        options.out.write_text(
            json.dumps({"setting": setting, "measured": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
