"""Where masks and formats make `x @ w` faster than dense: the table that `jsp.report` reads.

Masks run as a model runs them, `x @ w` with zeros in w. Stored blocks run forward, and forward with
both gradients, against a dense w, and against the dense weight made from the blocks for each
product, which is what `x @ w` does above `dense_above`. Each product runs right before or after
what it is compared with, in turns, and a figure is the median over rounds of their ratio.

`density` is the largest measured one at which three quarters of the rounds (of stored blocks the
median, in both passes) took at most 0.95 of the dense time, and so at all lower ones; 0 if there is
none. `dense_above` is the largest at which forward and backward together take no longer than with
the weight made dense. Formats of single weights, which are for inference, have one row in x.

    python -m experiments.bench_break_even [--write]
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jaxsparse as jsp

TABLE = Path(jsp.__file__).with_name("break_even.json")
PATTERNS = (jsp.Unstructured(), jsp.NM(2, 4), jsp.Block((32, 32)), jsp.Channel(-1), jsp.FanIn())
DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75)
BLOCKS = (16, 32, 64, 128)
BLOCK_DENSITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
ROWS, K, N = 512, 1024, 1024
FASTER = 0.95


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    rounds: int = 21
    """Rounds; each runs every product once."""
    only: tuple[str, ...] = ()
    """Names of the table to measure, e.g. BlockSparse; the others keep their figures."""
    write: bool = False
    """Put the figures into the table of the library."""


Ratios = dict[float, list[float]]  # density -> time over that of the base, in every round


def ratios(
    product: Callable[..., Any],
    pairs: Mapping[float, tuple[Any, Any]],
    x: jax.Array,
    dy: jax.Array,
    rounds: int,
) -> Ratios:
    """Times of the product with a weight over those with its base; pairs are (weight, base)."""

    def seconds(w: Any) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(product(x, w, dy))
        return time.perf_counter() - begin

    found: Ratios = {d: [] for d in pairs}
    for turn in range(-1, rounds):
        for d, (w, base) in pairs.items():
            if turn % 2:
                time_of_w, time_of_base = seconds(w), seconds(base)
            else:
                time_of_base, time_of_w = seconds(base), seconds(w)
            if turn >= 0:  # the first round compiles
                found[d].append(time_of_w / time_of_base)
    return found


def up_to(found: Ratios, quarter: int, limit: float) -> float:
    """The largest density at which this quartile of the ratios, as at all lower ones, is small."""
    slow = [d for d, r in found.items() if statistics.quantiles(r, n=4)[quarter - 1] > limit]
    return max((d for d in found if d < min(slow, default=2.0)), default=0.0)


def medians(found: Ratios) -> dict[str, float]:
    """For the table."""
    return {str(d): round(statistics.median(r), 3) for d, r in found.items()}


@jax.jit
def forward(x: jax.Array, w: Any, dy: jax.Array) -> jax.Array:
    """`x @ w`."""
    del dy
    return x @ w


@jax.jit
def both(x: jax.Array, w: Any, dy: jax.Array) -> Any:
    """`x @ w` and the gradients of x and of the values of w."""

    def product(x: jax.Array, values: jax.Array) -> jax.Array:
        return x @ (dataclasses.replace(w, values=values) if hasattr(w, "values") else values)

    y, pull = jax.vjp(product, x, getattr(w, "values", w))
    return y, pull(dy)


def of_masks(dense: jax.Array) -> Iterator[tuple[str, str, int, dict[float, Any]]]:
    """Name, what runs, rows of x, weights of each density: with zeros, or single ones packed."""
    for pattern in PATTERNS:
        some = (0.5,) if isinstance(pattern, jsp.NM) else DENSITIES
        masks = {d: jsp.make_mask(pattern, jnp.abs(dense), d) for d in some}
        weights = {d: jnp.where(mask, dense, 0) for d, mask in masks.items()}
        yield type(pattern).__name__, "x @ w with zeros in w", ROWS, weights
        if isinstance(pattern, jsp.NM):
            packed = {0.5: jsp.NMPacked.from_dense(dense, 2, 4)}
            yield "NMPacked", "x @ NMPacked, 2:4, forward, one row", 1, packed
        if isinstance(pattern, jsp.Unstructured):
            rows = {d: jsp.CSR.from_dense(dense, mask) for d, mask in masks.items() if d <= 0.25}
            yield "CSR", "x @ CSR, forward, one row", 1, rows


def of_blocks(
    size: int, dense: jax.Array, x: jax.Array, dy: jax.Array, rounds: int
) -> dict[str, Any]:
    """Limits and ratios of stored blocks of one size."""
    stored = {
        d: jsp.BlockSparse.random(jax.random.key(size), (K, N), block=(size, size), density=d)
        for d in BLOCK_DENSITIES
    }
    own = {d: dataclasses.replace(w, dense_above=1.0) for d, w in stored.items()}
    made = {d: dataclasses.replace(w, dense_above=0.0) for d, w in stored.items()}
    faster, dense_above, to_dense, to_made = [], 0.0, {}, {}
    for name, product in (("forward", forward), ("forward_backward", both)):
        found = ratios(product, {d: (own[d], dense) for d in stored}, x, dy, rounds)
        faster.append(up_to(found, 2, FASTER))
        to_dense[name] = medians(found)
        found = ratios(product, {d: (own[d], made[d]) for d in stored}, x, dy, rounds)
        dense_above = up_to(found, 2, 1.0)  # of the last: forward and backward
        to_made[name] = medians(found)
    return {
        "density": min(faster),
        "dense_above": max(dense_above, min(faster)),  # what beats dense beats making it first
        "ratio_to_dense": to_dense,
        "ratio_to_made_dense": to_made,
    }


def main(options: Options) -> None:
    """Measure, print and, if asked, write."""
    key = jax.random.key(0)
    x, dense = jax.random.normal(key, (ROWS, K)), jax.random.normal(key, (K, N))
    dy = jax.random.normal(key, (ROWS, N))
    found: dict[str, Any] = {}
    for name, runs, rows, weights in of_masks(dense):
        if options.only and name not in options.only:
            continue
        pairs = {d: (w, dense) for d, w in weights.items()}
        measured = ratios(forward, pairs, x[:rows], dy, options.rounds)
        limit = up_to(measured, 3, FASTER)
        found[name] = {"density": limit, "runs": runs, "ratio_to_dense": medians(measured)}
        print(f"{name}: {found[name]}", flush=True)
    if not options.only or "BlockSparse" in options.only:
        found["BlockSparse"] = {"runs": "x @ BlockSparse, the same number in every column"}
        blocks = found["BlockSparse"]["blocks"] = {}
        for size in BLOCKS:
            blocks[str(size)] = of_blocks(size, dense, x, dy, options.rounds)
            print(f"BlockSparse {size}: {blocks[str(size)]}", flush=True)
    if options.write:
        device = jax.devices()[0].device_kind
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        setting = f"jax {jax.__version__}, x {ROWS} x {K}, w {K} x {N}, float32, "
        setting += f"{options.rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[1]:.0f}"
        for entry in found.values():
            entry["measured"] = f"{datetime.date.today().isoformat()}, {setting}"
        table[device] = table.get(device, {}) | found
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
