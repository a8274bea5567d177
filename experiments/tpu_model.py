"""What block-sparse products should cost on a TPU: a static model, from the compiler's schedule.

    python -m experiments.tpu_model [--chips v5e v6e] [--shape 8192 20480 20480]
        [--out experiments/results/tpu_model.json]
    python -m experiments.tpu_model --budgets tests/pallas_kernels/tpu_budgets.json

Needs the extra `test-kernels` and no TPU. A grid step takes the largest of its bundles (see
`experiments/tpu_schedule.py`), its FLOPs at the rate of the matrix unit and its bytes at the rate
of HBM; a call adds what is done once per output block or tile of x, and the copies that nothing
hides. The dense product is XLA's own estimate. Every block row and column stores as many blocks.

This compares designs and guards a schedule; it is no measurement, see `CALIBRATION`. `--budgets`
writes the bundles that a test holds the kernels to.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import silu

from experiments.tpu_compile import compile_for, scope
from experiments.tpu_schedule import Schedule, dump_folder, schedule
from pallas_kernels import _block_sparse_matmul_tpu as kernels
from pallas_kernels._block_sparse_gated_tpu import forward as gated
from pallas_kernels._block_sparse_tpu import Config, choose_config
from pallas_kernels._compat import tpu
from pallas_kernels._topology import plan

SHAPE, DENSITIES, ITEM = (8192, 20480, 20480), (0.5, 0.2, 0.1, 0.05), 2
CALIBRATION = (
    "Modelled, not measured. Stalls and the latency of copies are left out, so times are too "
    "short. Predicted over measured time of published grouped matmuls (the same loop, other "
    "kernels): v5p 0.93 (median of 8, 0.88 to 0.95), v5e 0.72 to 0.94 (5), TPU7x 0.56 (median of "
    "8, 0.52 to 0.77), v6e never compared. As a rule of thumb multiply a predicted rate by 0.9 on "
    "v5, 0.6 on TPU7x, and assume 0.7 on v6e. Dense times are XLA's estimates, not calibrated."
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A topology to compile for, rates of one core in bfloat16, and the block size that suits."""

    topology: str
    clock: float  # Hz
    flops: float  # FLOP/s
    bandwidth: float  # HBM byte/s
    block: int


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 197e12, 819e9, 128),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 229e12, 1382e9, 128),
    "v6e": Chip("v6e:2x2", 1.75e9, 918e12, 1640e9, 256),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, 1153e12, 3690e9, 256),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and the dense product it replaces, of x [M, K], dy [M, N] and a weight [K, N]."""

    name: str  # of the pallas_call
    fn: Callable[..., Any]  # (x, dy, values, topology)
    dense: Callable[..., Any]  # (x, dy, w)
    transpose: bool = False
    gradient: bool = False
    weights: int = 1  # 2: a gated product, whose weights have the same shape


KERNELS = {
    "forward": Kernel(
        "block_sparse_matmul",
        lambda x, dy, values, topology: kernels.matmul(x, values, topology, False),
        lambda x, dy, w: x @ w,
    ),
    "dx": Kernel(
        "block_sparse_matmul",
        lambda x, dy, values, topology: kernels.matmul(dy, values, topology, True),
        lambda x, dy, w: dy @ w.T,
        transpose=True,
    ),
    "dw": Kernel(
        "block_sparse_gradient",
        lambda x, dy, values, topology: kernels.gradient(x, dy, topology, values.shape[1:]),
        lambda x, dy, w: x.T @ dy,
        gradient=True,
    ),
    "gated": Kernel(
        "block_sparse_gated",
        lambda x, dy, values, topology: gated(x, (values, topology), (values, topology), silu),
        lambda x, dy, w, up: silu(x @ w) * (x @ up),
        weights=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """M, K, N, side of a block, blocks stored in each block row and column."""

    shape: tuple[int, int, int]
    block: int
    live: int

    @property
    def structs(self) -> tuple[Any, ...]:
        """Shapes of x, dy, values and topology."""
        (m, k, n), b = self.shape, self.block
        slots = n // b * self.live
        struct = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
        places = struct(slots, dtype=jnp.int32)
        make = functools.partial(plan, grid=(k // b, n // b), fan_in=self.live)
        return struct(m, k), struct(m, n), struct(slots, b, b), jax.eval_shape(make, places, places)

    def config(self, kernel: Kernel, chip: str) -> Config:
        """The tiles that the kernel takes."""
        (m, k, n), b, weights = self.shape, self.block, kernel.weights
        depth, outs = (n, k // b) if kernel.transpose else (k, n // b)
        sizes = m, depth, outs * weights, (b, b), n // b * self.live * weights, jnp.bfloat16
        with scope(CHIPS[chip].topology):
            return choose_config(*sizes, tpu(), gradient=kernel.gradient, weights=weights)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one call on one device.

    Attributes:
        us: Microseconds.
        bound: What a step waits for: "bundles", "MXU" or "HBM".
        peak: FLOPs of the stored blocks over what the matrix units could do in that time.
    """

    us: float
    bound: str
    peak: float


def predict(
    problem: Problem, kernel: Kernel, config: Config, found: Schedule, chip: Chip
) -> Prediction:
    """The model; see the head of the file."""
    (m, k, n), b, live = problem.shape, problem.block, problem.live
    depth, outs = (n, k // b) if kernel.transpose else (k, n // b)
    bm, group, cores = config.bm, config.group, config.cores
    slots = live * n // b
    if slots % outs or slots // outs % group:
        raise ValueError(f"{live} blocks a column leave groups of {group} that are not full")
    steps = slots * kernel.weights // group  # of one panel, or of one tile of x
    mxu = 2 * bm * group * b * b / chip.flops * chip.clock
    hbm = lambda size: size * ITEM / chip.bandwidth * chip.clock  # noqa: E731
    if kernel.gradient:
        # A core takes a strip of steps over all tiles; the next tile of x comes meanwhile.
        strips, tiles = -(-steps // (config.strip * cores)) * cores, -(-m // bm)
        lines = min(outs, -(-config.strip * group * outs // slots) + 1)
        size = bm * depth + lines * bm * b + config.strip * group * b * b / tiles
        bounds = {"bundles": found.step, "MXU": mxu, "HBM": hbm(size) / config.strip}
        bound = max(bounds, key=lambda name: bounds[name])
        tile = config.strip * bounds[bound] + k // b * found.turn
        total = strips * (tiles * tile + config.strip * found.end) / cores
        total += hbm(bm * depth)
    else:
        panels = -(-m // bm)
        size = group * b * b + bm * (depth + outs * b) / steps
        bounds = {"bundles": found.step, "MXU": mxu, "HBM": hbm(size)}
        bound = max(bounds, key=lambda name: bounds[name])
        total = panels * (steps * bounds[bound] + outs * found.end) / cores
        total += hbm(bm * (depth + b))
    flops = 2 * m * b * b * slots * kernel.weights
    us = total / chip.clock * 1e6
    return Prediction(us, bound, flops / (chip.flops * cores) * 1e6 / us)


@functools.cache
def dense_us(shape: tuple[int, int, int], kernel: Kernel, chip: str) -> float:
    """XLA's estimate of the dense product: the sum over the fusions of the program."""
    m, k, n = shape
    sizes = (m, k), (m, n), *[(k, n)] * kernel.weights
    structs = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    text = compile_for(CHIPS[chip].topology, kernel.dense, *structs).as_text() or ""
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"?(\d+)', text)))
    return cycles / CHIPS[chip].clock * 1e6


def model(chip: str, name: str, shape: tuple[int, int, int], density: float) -> dict[str, Any]:
    """One row of the table."""
    rates, kernel = CHIPS[chip], KERNELS[name]
    problem = Problem(shape, rates.block, round(density * shape[1] // rates.block))
    config = problem.config(kernel, chip)
    found = schedule(CHIPS[chip].topology, kernel.fn, *problem.structs, kernel=kernel.name)
    guess = predict(problem, kernel, config, found, rates)
    dense = dense_us(shape, kernel, chip)
    flops = 2 * shape[0] * shape[1] * shape[2] * kernel.weights
    ideal = flops / (rates.flops * config.cores) * 1e6
    return {
        "chip": chip,
        "kernel": name,
        "block": rates.block,
        "sparsity": 1 - problem.live * rates.block / shape[1],
        "speedup": round(dense / guess.us, 2),
        "speedup over dense at peak": round(ideal / guess.us, 2),
        "us": round(guess.us, 1),
        "dense us": round(dense, 1),
        "dense fraction of peak": round(ideal / dense, 3),
        "fraction of peak": round(guess.peak, 3),
        "bound": guess.bound,
        "tiles": dataclasses.asdict(config),
        "bundles": dataclasses.asdict(found),
    }


def setting() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "libtpu": importlib.metadata.version("libtpu"),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def budgets(chips: list[str], shape: tuple[int, int, int] = SHAPE) -> list[dict[str, Any]]:
    """Bundles of every kernel at 90 %, for the test that guards them."""
    rows = []
    for chip in chips:
        for name, kernel in KERNELS.items():
            problem = Problem(shape, CHIPS[chip].block, shape[1] // CHIPS[chip].block // 10)
            found = schedule(CHIPS[chip].topology, kernel.fn, *problem.structs, kernel=kernel.name)
            rows.append(
                {
                    "chip": chip,
                    "kernel": name,
                    "block": problem.block,
                    "live": problem.live,
                    **dataclasses.asdict(found),
                }
            )
    return rows


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar="MKN")
    parser.add_argument("--out")
    parser.add_argument("--budgets", help="write the bundles of the kernels to this file instead")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU, as libtpu is there
    dump_folder()
    if options.budgets:
        _write(options.budgets, setting() | {"shape": SHAPE, "budgets": budgets(options.chips)})
        return
    print(CALIBRATION)
    print("chip   kernel   block  sparsity  speed-up  (at peak)        us  dense us  step  bound")
    rows = []
    for chip in options.chips:
        for name in KERNELS:
            for density in DENSITIES:
                row = model(chip, name, tuple(options.shape), density)
                rows.append(row)
                print(
                    f"{chip:6} {name:8} {row['block']:5} {row['sparsity']:9.0%} "
                    f"{row['speedup']:9.2f} {row['speedup over dense at peak']:10.2f} "
                    f"{row['us']:9.0f} {row['dense us']:9.0f} {row['bundles']['step']:5} "
                    f" {row['bound']}",
                    flush=True,
                )
    if options.out:
        kept = {"shape": list(options.shape), "dtype": "bfloat16", "calibration": CALIBRATION}
        _write(options.out, {"setting": setting() | kept, "modelled": rows})


def _write(path: str, what: Any) -> None:
    with open(path, "w") as file:
        json.dump(what, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
