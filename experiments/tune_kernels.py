"""Time the tile choices of the TPU kernels on the device at hand, and keep the best as data.

For each product (forward, dx) and dw of each problem: the choice by arithmetic and its neighbours
(rows, blocks a step, joined or not, length of a strip) that fit VMEM. The fastest goes
to `pallas_kernels/tuned/<device>.json`, which `choose_config` reads. `bench_tpu` runs
this; it can be run again, and replaces what it measures again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench_kernels import random_problem, seconds
from pallas_kernels import _tuned
from pallas_kernels._block_sparse_gradient_tpu import gradient
from pallas_kernels._block_sparse_matmul_tpu import matmul
from pallas_kernels._block_sparse_tpu import (
    Config,
    default_config,
    needs,
    problem,
    tile_room,
)
from pallas_kernels._compat import Tpu, tpu

GAIN = 0.98  # a choice must take less than this part of the default's time


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel on operands: what it is kept under, its default tiles, and how to run others."""

    name: str
    key: dict[str, Any]
    default: Config
    run: Callable[..., Any]  # (x, values, dy, config=)
    gradient: bool


def calls(x: Any, values: Any, dy: Any, topology: Any, interpret: Any = False) -> Iterator[Call]:
    """Forward, dx and dw of one weight."""
    (m, k), n, (slots, bk, bn), (r, c) = x.shape, dy.shape[1], values.shape, topology.grid
    modes = {
        "forward": (k, c, (bk, bn), False),
        "dx": (n, r, (bn, bk), False),
        "dw": (k, c, (bk, bn), True),
    }

    def run(x: Any, values: Any, dy: Any, *, name: str, config: Config) -> Any:
        options = {"config": config, "interpret": interpret}
        if name == "dw":
            return gradient(x, dy, topology, (bk, bn), **options)
        transpose = name == "dx"
        return matmul(dy if transpose else x, values, topology, transpose, **options)

    for name, (depth, outs, block, is_gradient) in modes.items():
        size = m, depth, outs, block, slots, x.dtype
        default = default_config(*size, tpu(), gradient=is_gradient)
        yield Call(
            name,
            problem(*size, is_gradient),
            default,
            functools.partial(run, name=name),
            is_gradient,
        )


def neighbours(call: Call, device: Tpu) -> list[Config]:
    """The default and what lies around it: each axis alone, and rows with blocks a step."""
    base, key = call.default, call.key
    item, live = jnp.dtype(key["dtype"]).itemsize, key["live"]
    groups = {g for g in (base.group // 2, base.group, base.group * 2) if 1 <= g <= live}
    heights = {base.bm // 2, base.bm, base.bm * 2}
    found = [dataclasses.replace(base, bm=bm, group=g) for bm in heights for g in groups]
    if call.gradient:
        strips = (max(1, base.strip // 2), base.strip, base.strip * 2)
        found = [dataclasses.replace(c, strip=s) for c in found for s in strips]
    else:
        found.append(dataclasses.replace(base, merge=not base.merge))
    least = 128 if call.gradient else 32 // item
    size = functools.partial(needs, depth=key["depth"], block=tuple(key["block"]), item=item)
    fit = [
        c
        for c in found
        if c.bm % least == 0 and size(c, gradient=call.gradient) <= tile_room(device)
    ]
    return [base, *sorted({c for c in fit if c != base}, key=dataclasses.astuple)]


def tune(
    call: Call, operands: tuple[Any, ...], device: Tpu, rounds: int, most: int | None = None
) -> dict[str, Any]:
    """Time every neighbour, or the first `most`; the median of `rounds`. All results must agree."""
    times: dict[Config, float] = {}
    want = None
    for config in neighbours(call, device)[:most]:
        fn = jax.jit(functools.partial(call.run, config=config))
        try:
            got = fn(*operands)
            runs = [seconds(fn, *operands) for _ in range(rounds + 1)][1:]
        except Exception as error:  # the compiler refuses what does not fit
            if config == call.default:
                raise
            print(f"  {call.name} {config} is refused: {str(error).splitlines()[0][:80]}")
            continue
        want = got if want is None else want
        if not jnp.allclose(got, want, rtol=0.02, atol=0.02 * float(jnp.abs(want).max())):
            raise SystemExit(f"{call.name} with {config} differs from {call.default}: report this")
        times[config] = statistics.median(runs)
    usual = times[call.default]
    best = min(times, key=lambda config: times[config])
    best = best if times[best] < GAIN * usual else call.default
    print(
        f"  {call.name:8} {1e3 * times[best]:9.3f} ms, default {1e3 * usual:9.3f} ms, "
        f"{len(times)} tried: {best}",
        flush=True,
    )
    return {
        "problem": call.key,
        "tiles": dataclasses.asdict(best),
        "us": round(1e6 * times[best], 1),
        "default us": round(1e6 * usual, 1),
    }


def tune_all(
    shape: tuple[int, int, int],
    block: tuple[int, int],
    dtype: Any,
    densities: Sequence[float],
    *,
    rounds: int = 10,
    interpret: Any = False,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Entries for `tuned/<device>.json`, of every density of one shape."""
    found = []
    for density in densities:
        print(f"tiles for {shape}, blocks {block}, density {density}", flush=True)
        x, values, dy, topology = random_problem(shape, block, density, dtype)
        for call in calls(x, values, dy, topology, interpret):
            found.append(tune(call, (x, values, dy), tpu(), rounds, most))
    return found


def keep(entries: list[dict[str, Any]], setting: dict[str, Any], path: Path) -> None:
    """Write the entries, and those that were there for other problems."""
    fresh = [entry["problem"] for entry in entries]
    old = [entry for entry in _tuned.read(path) if entry["problem"] not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "entries": [*old, *entries]}, indent=1) + "\n")
    _tuned.read.cache_clear()
