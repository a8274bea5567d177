"""What `x @ w` costs with weights stored without their zeros: time of dense / time of a format.

CSR and Condensed at 90, 95 and 99 % zeros and NMPacked 2:4, on square float32 weights. Dense and
each format take turns; each figure is the median over rounds of the ratio within a round.

    python -m experiments.bench_formats [--sizes 2048 4096]
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jaxsparse as jsp
from jaxsparse.formats import CSR, Condensed, NMPacked

BATCHES = (1, 8)
SPARSITIES = (0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    sizes: tuple[int, ...] = (2048, 4096)
    """Inputs and outputs of the weights."""
    rounds: int = 21
    """Rounds; each runs every product once."""


def seconds(product: Any, x: jax.Array, w: Any) -> float:
    """Time of one product."""
    begin = time.perf_counter()
    jax.block_until_ready(product(x, w))
    return time.perf_counter() - begin


def main(options: Options) -> None:
    """Measure and print."""
    product = jax.jit(lambda x, w: x @ w)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, dense / format")
    for size in options.sizes:
        dense = jax.random.normal(jax.random.key(0), (size, size))
        weights: dict[str, Any] = {"NMPacked 2:4": NMPacked.from_dense(dense, 2, 4)}
        for sparsity in SPARSITIES:
            mask = jsp.make_mask(jsp.Unstructured(), jnp.abs(dense), 1 - sparsity)
            weights[f"CSR {sparsity:.0%}"] = CSR.from_dense(dense, mask)
            mask = jsp.make_mask(jsp.FanIn(), jnp.abs(dense), 1 - sparsity)
            weights[f"Condensed {sparsity:.0%}"] = Condensed.from_dense(dense, mask)
        for batch in BATCHES:
            x = jax.random.normal(jax.random.key(1), (batch, size))
            for w in (dense, *weights.values()):
                seconds(product, x, w)
            bases: list[float] = []
            ratios: dict[str, list[float]] = {name: [] for name in weights}
            for _ in range(options.rounds):
                for name, w in weights.items():
                    bases.append(seconds(product, x, dense))
                    ratios[name].append(bases[-1] / seconds(product, x, w))
            found = {name: round(statistics.median(r), 2) for name, r in ratios.items()}
            base = 1e3 * statistics.median(bases)
            print(f"{size} x {size}, batch {batch}, dense {base:.2f} ms: {found}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
