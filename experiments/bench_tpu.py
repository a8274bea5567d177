"""One command for a machine with a TPU: are the kernels right, how fast, and with which tiles.

    make bench-tpu                  or: python -m experiments.bench_tpu
    make bench-tpu ARGS="--dry"     the same path on a CPU, tiny and interpreted; times mean nothing

1. `check_kernels`: y, dx and dw of every case against numpy. If one is wrong, nothing is timed.
2. `tune_kernels`: tiles -> `pallas_kernels/tuned/<device>.json`, which the kernels read.
3. `bench_kernels`: the table of each shape, first with the default tiles and then with the tuned
   ones -> `experiments/results/bench_kernels_<device>.json`.

Both files belong into the repository: what the documentation says of a device rests on them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench_kernels import DENSITIES, setting, table
from experiments.check_kernels import check_all
from experiments.tune_kernels import keep, tune_all
from pallas_kernels import _tuned
from pallas_kernels._block_sparse_matmul import CASES
from pallas_kernels._block_sparse_matmul_tpu import gradients, matmul
from pallas_kernels._compat import Tpu, tpu
from pallas_kernels._op import here

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure: shapes (M, K, N), blocks, and how often."""

    shapes: tuple[tuple[int, int, int], ...]
    block: tuple[int, int]
    dtype: str
    densities: tuple[float, ...]
    rounds: int


def plan_for(device: Tpu) -> Plan:
    """A feed-forward layer, up and down, and a wide square one; blocks as wide as the MXU."""
    shapes = (8192, 4096, 16384), (8192, 16384, 4096), (8192, 20480, 20480)
    return Plan(shapes, (device.mxu, device.mxu), "bfloat16", DENSITIES, 15)


DRY = Plan(((32, 256, 256),), (128, 128), "float32", (0.5,), 3)


def interpreted(x: Any, values: Any, dy: Any, topology: Any) -> tuple[Any, ...]:
    """y, dx and dvalues by the TPU kernels in interpret mode."""
    y = matmul(x, values, topology, False, interpret=True)
    return y, *gradients(x, dy, values, topology, interpret=True)


@contextlib.contextmanager
def tiles_of(folder: Path) -> Iterator[None]:
    """Let kernels read measured tiles from this folder, which may be empty."""
    usual, _tuned.FOLDER = _tuned.FOLDER, folder
    jax.clear_caches()  # the choice is made when a kernel is traced
    try:
        yield
    finally:
        _tuned.FOLDER = usual
        jax.clear_caches()


def main(arguments: list[str] | None = None) -> None:
    """Check, tune, measure, and keep both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="try the command without a TPU")
    parser.add_argument("--tuned", type=Path, default=_tuned.FOLDER, help="folder of the tiles")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    if options.dry and {options.tuned, options.results} & {_tuned.FOLDER, RESULTS}:
        parser.error("--dry measures nothing, so it keeps nothing here: give --tuned and --results")
    if not options.dry and here() != "tpu":
        parser.error(f"this is {jax.devices()[0].device_kind}, not a TPU; --dry tries it without")
    device = tpu()
    plan = DRY if options.dry else plan_for(device)
    name = device.name or "tpu_" + jax.devices()[0].device_kind.lower().replace(" ", "_")

    wrong = check_all(CASES[1:3], interpreted) if options.dry else check_all()
    if wrong:
        raise SystemExit(f"wrong results in {wrong}: please report this, with the lines above")

    short: dict[str, Any] = {"interpret": True, "most": 2} if options.dry else {}
    entries, tables = [], []
    for shape in plan.shapes:
        problem = shape, plan.block, jnp.dtype(plan.dtype)
        with tiles_of(Path("nowhere")):
            before = table(*problem, plan.rounds, plan.densities)
        entries += tune_all(*problem, plan.densities, rounds=plan.rounds, **short)
        keep(entries, setting(), options.tuned / f"{name}.json")
        with tiles_of(options.tuned):
            after = table(*problem, plan.rounds, plan.densities)
        found = {"shape": shape, "block": plan.block, "dtype": plan.dtype, "rounds": plan.rounds}
        tables.append(found | {"default tiles": before, "tuned tiles": after})
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"bench_kernels_{name}.json"
        path.write_text(json.dumps({"setting": setting(), "measured": tables}, indent=1) + "\n")
        print(f"kept {path} and {options.tuned / name}.json", flush=True)


if __name__ == "__main__":
    main()
