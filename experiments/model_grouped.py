"""What grouped matmul should cost on a TPU: a static model, from the compiler's schedule.

    python -m experiments.model_grouped [--chips v5e v6e]
        [--out experiments/results/model_grouped.json]
    python -m experiments.model_grouped --budgets tests/pallas_kernels/grouped_budgets.json

Needs the extra `test-kernels` and no TPU. Visits are counted for groups of equal size, and for
groups of rows that choose one each by chance, whose ends meet inside tiles. A visit takes the
larger of its bundles and of its FLOPs at the rate of the matrix unit. A group takes the larger of
its visits and of its bytes at the rate of HBM: tiles of x and of the result, and the matrix of the
group after, or for dW the gradient of the group before.

The dense product is XLA's estimate of one batched product of as many groups of equal size, which
reads as many matrices; "peak" is what FLOPs, or bytes if they take longer, take at their rates.
This is a model and no measurement, see `CALIBRATION` in `tpu_model`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tpu_compile import compile_for, scope
from experiments.tpu_model import CALIBRATION, CHIPS, ITEM, setting
from experiments.tpu_schedule import dump_folder, walk, written
from pallas_kernels import _grouped_matmul_tpu as kernels
from pallas_kernels._compat import tpu
from pallas_kernels._grouped_gradient_tpu import gradient
from pallas_kernels._grouped_tpu import Config, Visits, choose_config, visits

K, N, GROUPS, MEANS = 4096, 14336, 16, (256, 512, 1024, 2048)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, and the dense product of equal work, of x [E, m, K], dy [E, m, N], w [E, K, N]."""

    name: str  # of the pallas_call
    fn: Callable[..., Any]  # (x, dy, w, group_sizes)
    dense: str
    transpose: bool = False
    gradient: bool = False


KERNELS = {
    "forward": Kernel(
        "grouped_matmul", lambda x, dy, w, s: kernels.matmul(x, w, s, False), "emk,ekn->emn"
    ),
    "dx": Kernel(
        "grouped_matmul",
        lambda x, dy, w, s: kernels.matmul(dy, w, s, True),
        "emn,ekn->emk",
        transpose=True,
    ),
    "dw": Kernel(
        "grouped_gradient", lambda x, dy, w, s: gradient(x, dy, s), "emk,emn->ekn", gradient=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Of a grid step.

    Attributes:
        whole: One that multiplies a whole tile.
        half: One that multiplies half a tile; of dW the same as `whole`.
        extra: What a step may do beside: clear a tile that is shared, or of dW store sums.
        spills: Registers stored for want of room, in the whole kernel.
    """

    whole: int
    half: int
    extra: int
    spills: int


def bundles(chip: str, name: str, t: int, e: int) -> tuple[Config, Bundles]:
    """The tiles that a kernel takes, and its schedule."""
    kernel = KERNELS[name]
    depth, n = (N, K) if kernel.transpose else (K, N)
    with scope(CHIPS[chip].topology):
        config = choose_config(t, e, depth, n, jnp.bfloat16, tpu(), gradient=kernel.gradient)
    key = chip, name, config
    if key not in _FOUND:
        texts = written(CHIPS[chip].topology, kernel.fn, *structs(t, e), kernel=kernel.name)
        _FOUND[key] = read(*texts, turns=1 if kernel.gradient else depth // config.tk)
    return config, _FOUND[key]


_FOUND: dict[Any, Bundles] = {}  # a step does not depend on the number of rows


def read(text: str, use: str, delay: int, turns: int) -> Bundles:
    """From texts as `tpu_schedule.read` takes them, and the turns of the loop over columns."""
    way = walk(text, use, delay)
    grid = way.grid()
    regions = [range(first, to) for _, first, to in way.branches(grid)]
    multiply = [region for region in regions if any(way.product[i] for i in region)]
    arms = [a for a in multiply if not any(a != b and b[0] in a and b[-1] in a for b in multiply)]
    others = [r for r in regions if r not in multiply and any(way.store[i] for i in r)]
    # A branch around the whole step is no arm, and what is within an arm belongs to it.
    others = [r for r in others if not any(r[0] in arm for arm in arms)]
    beside = len(grid) - sum(len(set(r)) for r in (*arms, *others))
    lengths = []
    for arm in arms:
        loops = [
            loop for loop in way.loops(arm.start, arm.stop) if any(way.product[i] for i in loop)
        ]
        again = sum(len(loop) * (turns - 2) for loop in loops)  # the first stands before it
        lengths.append(beside + len(arm) + again)
    extra = len(others[-1]) if others else 0  # of dW the first one clears sums, without rows
    return Bundles(max(lengths), min(lengths), extra, way.spills)


def structs(t: int, e: int) -> tuple[Any, ...]:
    """Shapes of x, dy, w and group_sizes."""
    struct = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    return struct(t, K), struct(t, N), struct(e, K, N), struct(e, dtype=jnp.int32)


def cycles(
    chip: str, kernel: Kernel, config: Config, found: Bundles, lists: Visits, e: int
) -> tuple[float, str]:
    """Cycles of one call, and what most of them wait for; see the head of the file."""
    rates, tm, tn = CHIPS[chip], config.tm, config.tn
    depth, n = (N, K) if kernel.transpose else (K, N)
    deep = config.tk if kernel.gradient else depth
    steps = int(lists.steps)
    turn, lo, hi = (np.asarray(a)[:steps] for a in (lists.turn, lists.lo, lists.hi))
    mxu = 2 * tm * tn * deep / rates.flops * rates.clock
    hbm = lambda size: size * ITEM / rates.bandwidth * rates.clock  # noqa: E731
    half = ((lo >= tm // 2) | (hi <= tm // 2)) & (not kernel.gradient)
    taken = np.where(half, max(found.half, mxu / 2), max(found.whole, mxu))
    taken = taken + np.where((hi - lo < tm) & (not kernel.gradient), found.extra, 0)
    taken = np.bincount(turn, taken, minlength=e)[:e]
    count = np.bincount(turn, minlength=e)[:e]
    if kernel.gradient:
        taken = taken + found.extra
        moved = hbm(count * tm * (deep + tn) + deep * tn)
        panels = -(-n // tn) * -(-depth // deep)
    else:
        moved = hbm(count * tm * (depth + tn) + (count > 0) * depth * tn)
        panels = -(-n // tn)
    total = panels * np.maximum(taken, moved).sum() / config.cores
    total += hbm(tm * (deep + tn) if kernel.gradient else depth * tn)  # nothing hides the first
    return total, "HBM" if moved.sum() > taken.sum() else "step"


@functools.cache
def dense_cycles(chip: str, spec: str, e: int, m: int) -> float:
    """XLA's estimate: the sum over the fusions of the program."""
    sizes = {"e": e, "m": m, "k": K, "n": N}
    left, right = spec.split("->")[0].split(",")
    of = [jax.ShapeDtypeStruct([sizes[c] for c in part], jnp.bfloat16) for part in (left, right)]
    compiled = compile_for(CHIPS[chip].topology, lambda a, b: jnp.einsum(spec, a, b), *of)
    text = compiled.as_text() or ""
    return float(sum(map(int, re.findall(r'"estimated_cycles":"?(\d+)', text))))


def model(chip: str, name: str, mean: int) -> list[dict[str, Any]]:
    """Rows of the table: groups of equal size, and of random sizes."""
    kernel, rates, e, t = KERNELS[name], CHIPS[chip], GROUPS, GROUPS * mean
    config, found = bundles(chip, name, t, e)
    dense = dense_cycles(chip, kernel.dense, e, mean)
    flops, size = 2 * t * K * N, (t * (K + N) + e * K * N) * ITEM
    ideal = max(flops / (rates.flops * config.cores), size / (rates.bandwidth * config.cores))
    rng = np.random.default_rng(0)
    chance = rng.multinomial(t, np.full(e, 1 / e))
    rows = []
    for kind, sizes in (("equal", np.full(e, mean)), ("random", chance)):
        lists = visits(jnp.asarray(sizes), t, config.tm, empty=kernel.gradient)
        total, bound = cycles(chip, kernel, config, found, lists, e)
        rows.append(
            {
                "chip": chip,
                "kernel": name,
                "mean rows": mean,
                "sizes": kind,
                "rate over dense": round(dense / total, 3),
                "fraction of peak": round(ideal * rates.clock / total, 3),
                "dense fraction of peak": round(ideal * rates.clock / dense, 3),
                "us": round(total / rates.clock * 1e6, 1),
                "bound": bound,
                "tiles": dataclasses.asdict(config),
                "bundles": dataclasses.asdict(found),
            }
        )
    return rows


def budgets(chips: list[str], mean: int = 512) -> list[dict[str, Any]]:
    """Bundles of every kernel, for the test that guards them."""
    return [
        {
            "chip": chip,
            "kernel": name,
            **dataclasses.asdict(bundles(chip, name, GROUPS * mean, GROUPS)[1]),
        }
        for chip in chips
        for name in KERNELS
    ]


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--out")
    parser.add_argument("--budgets", help="write the bundles of the kernels to this file")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU, as libtpu is there
    dump_folder()
    kept = {"shape": {"K": K, "N": N, "groups": GROUPS}, "dtype": "bfloat16"}
    if options.budgets:
        _write(options.budgets, setting() | kept | {"budgets": budgets(options.chips)})
        if not options.out:
            return
    print(CALIBRATION)
    print(
        "chip   kernel   rows sizes   rate over dense  fraction of peak  dense  bound  whole  half"
    )
    rows = []
    for chip in options.chips:
        for name in KERNELS:
            for mean in MEANS:
                for row in model(chip, name, mean):
                    rows.append(row)
                    found = row["bundles"]
                    print(
                        f"{chip:6} {name:8} {mean:4} {row['sizes']:7}"
                        f" {row['rate over dense']:15.2f} {row['fraction of peak']:17.2f}"
                        f" {row['dense fraction of peak']:6.2f}  {row['bound']:5}"
                        f" {found['whole']:6} {found['half']:5}",
                        flush=True,
                    )
    if options.out:
        kept |= {"calibration": CALIBRATION}
        _write(options.out, {"setting": setting() | kept, "modelled": rows})


def _write(path: str, what: Any) -> None:
    with open(path, "w") as file:
        json.dump(what, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
