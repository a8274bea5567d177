"""Where a mask makes `x @ w` faster than dense: the table that `jsp.report` reads.

For each pattern and density, the masked weight runs as a model runs it, `x @ w` with zeros in w,
against the same product with a dense w, in turns. The break-even density is the largest measured
one at which three quarters of the products took at most 0.95 of the dense time (and so at all lower
ones); 0 if there is none.

    python -m experiments.bench_break_even [--write]
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jaxsparse as jsp

TABLE = Path(jsp.__file__).with_name("break_even.json")
PATTERNS = (jsp.Unstructured(), jsp.NM(2, 4), jsp.Block((32, 32)), jsp.Channel(-1), jsp.FanIn())
DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75)
ROWS, K, N = 512, 1024, 1024
FASTER = 0.95


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    rounds: int = 21
    """Rounds; each runs every product once."""
    write: bool = False
    """Put the figures into the table of the library."""


def seconds(product: Any, x: jax.Array, w: jax.Array) -> float:
    """Time of one product."""
    begin = time.perf_counter()
    jax.block_until_ready(product(x, w))
    return time.perf_counter() - begin


def main(options: Options) -> None:
    """Measure, print and, if asked, write."""
    key = jax.random.key(0)
    x, dense = jax.random.normal(key, (ROWS, K)), jax.random.normal(key, (K, N))
    product = jax.jit(jnp.matmul)
    found: dict[str, Any] = {}
    for pattern in PATTERNS:
        densities = (0.5,) if isinstance(pattern, jsp.NM) else DENSITIES
        masked = {
            d: jnp.where(jsp.make_mask(pattern, jnp.abs(dense), d), dense, 0) for d in densities
        }
        seconds(product, x, dense)
        ratios: dict[float, list[float]] = {d: [] for d in densities}
        for _ in range(options.rounds):
            base = seconds(product, x, dense)
            for d, w in masked.items():
                ratios[d].append(seconds(product, x, w) / base)
        medians = {d: statistics.median(r) for d, r in ratios.items()}
        slow = [d for d, r in ratios.items() if statistics.quantiles(r, n=4)[2] > FASTER]
        below = [d for d in densities if d < min(slow, default=1.0)]
        name = type(pattern).__name__
        found[name] = {
            "density": max(below, default=0.0),
            "runs": "x @ w with zeros in w",
            "ratio_to_dense": {str(d): round(r, 3) for d, r in medians.items()},
        }
        print(f"{name}: {found[name]}", flush=True)
    if options.write:
        device = jax.devices()[0].device_kind
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        setting = f"jax {jax.__version__}, x {ROWS} x {K}, w {K} x {N}, float32"
        today = datetime.date.today().isoformat()
        table[device] = {"measured": f"{today}, {setting}", **found}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
