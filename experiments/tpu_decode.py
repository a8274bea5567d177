"""What decode attention should cost on a TPU: the compiler's schedule against bytes / bandwidth.

    python -m experiments.tpu_decode [--chips v5e v6e] [--out experiments/results/tpu_decode.json]

Needs the extra `test-kernels` and no TPU. All lists are full. A call takes the longer of its
bundles, (chunks * step + end) for each list, and of the bytes of the listed pages at the rate of
HBM; the first chunk hides behind nothing. `factor` is that over bytes / bandwidth: 1 would be a
kernel that is never seen. `prepare us` is XLA's own estimate of making the lists, before the kernel
starts. A model, no measurement: stalls and the latency of copies are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.tpu_compile import compile_for, scope
from experiments.tpu_model import CHIPS
from experiments.tpu_schedule import dump_folder, read_nested, written
from pallas_kernels import _sparse_decode as op
from pallas_kernels._compat import tpu
from pallas_kernels._sparse_decode_tpu import choose_config

NAME = "sparse_decode_attention"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call in bfloat16; every list is full."""

    d: int = 128
    page: int = 64
    tokens: int = 1
    keys: int = 4096  # of a list
    batch: int = 8
    heads: tuple[int, int] = (32, 8)

    @property
    def planes(self) -> int:
        """Of the cache."""
        return 1 if self.d == 64 else 2

    @property
    def structs(self) -> tuple[Any, ...]:
        """Shapes of the operands, in their order."""
        (h, kv_heads), lists = self.heads, self.keys // self.page
        places = 8 * lists
        cache = self.batch * places, kv_heads, self.planes, self.page, 2 * self.d // self.planes
        struct = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
        return (
            struct(self.batch, self.tokens, h, self.d, dtype=jnp.bfloat16),
            struct(*cache, dtype=jnp.bfloat16),
            struct(self.batch, kv_heads, lists),
            struct(self.batch, kv_heads),
            struct(self.batch, places),
            struct(self.batch, self.tokens),
        )


PROBLEMS = (
    Problem(page=16),
    Problem(),
    Problem(page=128),
    Problem(tokens=4),
    Problem(d=64),
    Problem(d=256),
)


def call(*operands: Any) -> Any:
    """The kernel with its lists made before."""
    d = operands[0].shape[-1]
    return op._attend("tpu", d**-0.5, None, False, *operands)[0]


def model(chip: str, problem: Problem) -> dict[str, Any]:
    """One row of the table."""
    rates, (h, kv_heads) = CHIPS[chip], problem.heads
    rows, page = -(-problem.tokens * h // kv_heads // 16) * 16, problem.page
    width = 2 * problem.d // problem.planes
    with scope(rates.topology):
        entries = problem.keys // page
        config = choose_config(rows, problem.planes, page, width, entries, jnp.bfloat16, tpu())
    found = read_nested(*written(rates.topology, call, *problem.structs, kernel=NAME))
    chunk = config.pages * page * 4 * problem.d / rates.bandwidth * rates.clock
    chunks, lists = -(-entries // config.pages), problem.batch * kv_heads // config.cores
    hbm = lists * problem.keys * 4 * problem.d / rates.bandwidth * rates.clock
    bundles = lists * (chunks * found.step + found.end)
    cycles = max(hbm, bundles) + chunk
    return {
        "chip": chip,
        "d": problem.d,
        "page": page,
        "tokens": problem.tokens,
        "chunk": config.pages * page,
        "step": found.step,
        "end": found.end,
        "spills": found.spills,
        "bundles over bytes": round(bundles / hbm, 3),
        "factor": round(cycles / hbm, 3),
        "us": round(cycles / rates.clock * 1e6, 1),
    }


def prepare_us(chip: str, problem: Problem) -> float | None:
    """XLA's estimate of what it does before the kernel; None where it cannot be read."""
    try:
        text = compile_for(CHIPS[chip].topology, call, *problem.structs).as_text() or ""
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10.2 does not print every program
        return None
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"?(\d+)', text)))
    return round(cycles / CHIPS[chip].clock * 1e6, 1)


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--out")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU, as libtpu is there
    dump_folder()
    print("chip     D  page  tokens  chunk  step  end  bundles/bytes  factor      us  prepare us")
    rows = []
    for chip in options.chips:
        for problem in PROBLEMS:
            row = model(chip, problem) | {"prepare us": prepare_us(chip, problem)}
            rows.append(row)
            print(
                f"{chip:5} {row['d']:4} {row['page']:5} {row['tokens']:7} {row['chunk']:6} "
                f"{row['step']:5} {row['end']:4} {row['bundles over bytes']:14.2f} "
                f"{row['factor']:7.2f} {row['us']:7.1f} {row['prepare us']}",
                flush=True,
            )
    if options.out:
        setting = {
            "libtpu": importlib.metadata.version("libtpu"),
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "modelled": "not measured; stalls and the latency of copies are left out",
            "problem": "bfloat16, 8 sequences, 32 heads, 8 key heads, 4096 keys a list",
        }
        with open(options.out, "w") as file:
            json.dump({"setting": setting, "modelled": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
