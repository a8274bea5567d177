r"""What block-sparse attention should cost on a TPU: a static model, from the compiler's schedule.

    python -m experiments.tpu_model_attention [--chips v5e v6e] [--heads 1 4]
        [--out experiments/results/tpu_model_attention.json]
    python -m experiments.tpu_model_attention --chips v5e v6e \
        --budgets tests/pallas_kernels/attention_tpu_budgets.json

Needs the extra `test-kernels` and no TPU. Causal, head width 128, bfloat16, blocks of 128 kept at
random, each query block its own. A tile takes the largest of its bundles (see
`experiments/tpu_schedule.py`), its FLOPs at the rate of the matrix unit and, where it is gathered,
its bytes at the rate of HBM; the walk over every list is followed tile by tile, and a list adds
what is done once. Loops are counted whole: both ways to fetch a next tile, though one is taken.

Dense attention is the same kernel on blocks of 1024 x 1024. "tile" is what a pair of tokens costs
in a tile of full blocks, and "call" in the whole call, over the same of dense attention; speed-up
is over dense attention, and "over full" over the kernel with all causal blocks of 128. This
compares designs and guards a schedule; it is no measurement, see `CALIBRATION` in `tpu_model`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tpu_compile import scope
from experiments.tpu_model import CALIBRATION, CHIPS, ITEM, Chip, setting
from experiments.tpu_schedule import Walk, dump_folder, walk, written
from pallas_kernels import _block_sparse_attention_backward_tpu as kernels
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._attention_tiles_tpu import plan_cols, plan_rows
from pallas_kernels._attention_tpu import Plan
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._compat import tpu

TOKENS, WIDTH, BLOCK, DENSE, UNITS = 32768, 128, 128, 1024, 8
DENSITIES = (0.5, 0.2, 0.1, 0.05)
FLOPS = {"forward": 4, "dq": 6, "dkv": 8}  # a pair of tokens, over the head width


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention of `UNITS` key-value heads with as many masks, and `heads` query heads on each."""

    heads: int
    block: int
    tokens: int = TOKENS

    @property
    def form(self) -> Form:
        """What is static."""
        tokens = self.tokens, self.tokens
        return Form((self.block, self.block), tokens, (), True, WIDTH**-0.5)

    @property
    def structs(self) -> tuple[Any, ...]:
        """Shapes of q, k, statistics, lists and extras."""
        t, n = self.tokens, self.tokens // self.block
        struct = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
        ints = functools.partial(struct, dtype=jnp.int32)
        lists = BlockLists(
            ints(1, UNITS, n, n), ints(1, UNITS, n, n), ints(1, UNITS, n), ints(1, UNITS, n)
        )
        q, k = struct(1, UNITS, self.heads, t, WIDTH), struct(1, UNITS, t, WIDTH)
        return q, k, struct(*q.shape[:-1], dtype=jnp.float32), lists, Extras(ints(1))

    def plan(self, kernel: str, chip: str) -> Plan:
        """The tiles that a kernel takes."""
        q, k, _, lists, _ = self.structs
        with scope(CHIPS[chip].topology):
            if kernel == "dkv":
                return plan_cols(self.form, q, k, lists, tpu())
            return plan_rows(self.form, q, k, lists, tpu(), kernel)


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Of one kernel.

    Attributes:
        full: A tile of full blocks.
        masked: Of tiles with partial blocks, by members.
        list_: What a list adds.
    """

    full: int
    masked: dict[int, int]
    list_: int


def loops(way: Walk) -> tuple[int, int, int]:
    """Bundles of the loop over full tiles, of that over masked ones, and of a list beside."""
    grid = way.grid()
    inner = [
        loop
        for loop in way.loops(grid.start, grid.stop)
        if loop != grid and any(way.product[i] for i in loop)
    ]
    full, masked = (len(loop) for loop in sorted(inner, key=lambda loop: loop.start)[:2])
    return full, masked, len(grid) - sum(len(loop) for loop in inner)


@functools.cache
def compiled(problem: Problem, kernel: str, chip: str, members: int) -> tuple[int, int, int]:
    """`loops` of a kernel with tiles of so many members."""
    plan = dataclasses.replace(problem.plan(kernel, chip), members=members)

    def run(q: Any, k: Any, lse: Any, lists: Any, extras: Any) -> Any:
        if kernel == "forward":
            return kernels.forward(problem.form, q, k, k, lists, extras, plan=plan)
        plans = (plan, problem.plan("dkv", chip)) if kernel == "dq" else (None, plan)
        some = kernels.dq if kernel == "dq" else kernels.dkv
        plan_ = plans[0] or plans[1]
        return some(problem.form, q, k, k, lse, q, lse, lists, extras, plan_)

    name = "block_sparse_attention" + ("" if kernel == "forward" else f"_{kernel}")
    return loops(walk(*written(CHIPS[chip].topology, run, *problem.structs, kernel=name)))


def bundles(problem: Problem, kernel: str, chip: str) -> Bundles:
    """Of the tiles that a kernel takes; a last tile counts as a loop over tiles of its size."""
    plan = problem.plan(kernel, chip)
    full, _, _ = compiled(problem, kernel, chip, plan.members)
    masked = {size: compiled(problem, kernel, chip, size)[1] for size in plan.sizes}
    return Bundles(full, masked, compiled(problem, kernel, chip, 1)[2])


def kept(problem: Problem, density: float) -> np.ndarray:
    """A map of causal blocks: the diagonal and others by chance, so many in every row."""
    n, rng = problem.tokens // problem.block, np.random.default_rng(0)
    found = np.eye(n, dtype=bool)
    for r in range(1, n):
        found[r, rng.permutation(r)[: max(0, round(density * (r + 1)) - 1)]] = True
    return found


def cycles(plan: Plan, found: Bundles, counts: np.ndarray, kernel: str, chip: Chip) -> float:
    """Of a call whose lists have so many entries, one of them partial."""
    rows = plan.own if plan.by_key else plan.own * plan.heads
    keys = plan.listed * (plan.heads if plan.by_key else 1)
    hbm = lambda size: size * ITEM / chip.bandwidth * chip.clock  # noqa: E731

    def tile(members: int, bundles: int) -> float:
        mxu = FLOPS[kernel] * WIDTH * rows * members * keys / chip.flops * chip.clock
        moved = 0 if plan.resident else hbm(2 * members * keys * WIDTH)
        return max(bundles, mxu, moved)

    c, total = plan.members, 0.0
    for count in counts:
        whole = (count - 1) // c
        rest = count - whole * c
        total += found.list_ + whole * tile(c, found.full)
        total += rest // c * tile(c, found.masked[c])
        if rest % c:
            size = min(size for size in plan.sizes if size >= rest % c)
            total += tile(size, found.masked[size])
    # Keys and values of the next head come meanwhile; those of the first one nothing hides.
    panel = hbm(2 * TOKENS * WIDTH) if plan.resident else 0
    heads = plan.units // plan.units_per_head
    return (heads * max(total * plan.units_per_head, panel) + panel * plan.cores) / plan.cores


def call(problem: Problem, kernel: str, chip: str, blocks: np.ndarray) -> float:
    """Cycles of a call with such a map for every head."""
    counts = blocks.sum(0 if kernel == "dkv" else 1)
    found = bundles(problem, kernel, chip)
    return cycles(problem.plan(kernel, chip), found, counts, kernel, CHIPS[chip])


def model(chip: str, heads: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    sparse, dense = Problem(heads, BLOCK), Problem(heads, DENSE)
    everything = {p.block: np.tri(p.tokens // p.block, dtype=bool) for p in (sparse, dense)}
    rows = []
    for name, parts in (("forward", ("forward",)), ("backward", ("dq", "dkv"))):
        for density in DENSITIES:
            blocks = kept(sparse, density)
            share = blocks.sum() / everything[BLOCK].sum()
            times = {
                which: sum(call(p, part, chip, b) for part in parts)
                for which, p, b in (
                    ("sparse", sparse, blocks),
                    ("full", sparse, everything[BLOCK]),
                    ("dense", dense, everything[DENSE]),
                )
            }
            pairs = {b: everything[b].sum() * b * b for b in (BLOCK, DENSE)}
            rows.append(
                {
                    "chip": chip,
                    "heads": heads,
                    "kernel": name,
                    "sparsity": round(1 - share, 3),
                    "tile": round(sum(tile_cost(sparse, dense, part, chip) for part in parts), 3),
                    "call": round(
                        times["sparse"] / (share * pairs[BLOCK]) / (times["dense"] / pairs[DENSE]),
                        3,
                    ),
                    "speedup": round(times["dense"] / times["sparse"], 2),
                    "over full": round(times["full"] / times["sparse"], 2),
                    "us": round(times["sparse"] / CHIPS[chip].clock * 1e6),
                    "dense us": round(times["dense"] / CHIPS[chip].clock * 1e6),
                }
            )
    return rows


def tile_cost(sparse: Problem, dense: Problem, kernel: str, chip: str) -> float:
    """What a pair costs in a full tile, over the same of a dense one; a mean for two kernels."""
    costs = []
    for problem in (sparse, dense):
        plan = problem.plan(kernel, chip)
        pairs = plan.own * plan.heads * plan.members * plan.listed
        costs.append(compiled(problem, kernel, chip, plan.members)[0] / pairs)
    return costs[0] / costs[1] / (1 if kernel == "forward" else 2)


def budgets(chips: list[str]) -> list[dict[str, Any]]:
    """Bundles of each kernel with two query heads a key head, for the test that guards them."""
    rows = []
    for chip in chips:
        for kernel in FLOPS:
            problem = Problem(2, BLOCK)
            members = min(8, problem.plan(kernel, chip).members)
            found = compiled(problem, kernel, chip, members)
            names = "full", "masked", "list"
            row = {"chip": chip, "kernel": kernel, "members": members}
            rows.append(row | dict(zip(names, found, strict=True)))
    return rows


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--out")
    parser.add_argument("--budgets", help="write the bundles of the kernels to this file instead")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU, as libtpu is there
    dump_folder()
    if options.budgets:
        _write(options.budgets, setting() | {"budgets": budgets(options.chips)})
        return
    print(CALIBRATION)
    print("chip   heads kernel   sparsity  tile  call  speed-up  over full       us  dense us")
    rows = []
    for chip in options.chips:
        for heads in options.heads:
            for row in model(chip, heads):
                rows.append(row)
                print(
                    f"{chip:6} {heads:5} {row['kernel']:8} {row['sparsity']:8.1%} "
                    f"{row['tile']:5.2f} {row['call']:5.2f} {row['speedup']:9.2f} "
                    f"{row['over full']:10.2f} {row['us']:8} {row['dense us']:9}",
                    flush=True,
                )
    if options.out:
        kept_ = {"tokens": TOKENS, "head width": WIDTH, "block": BLOCK, "units": UNITS}
        kept_ |= {"dtype": "bfloat16", "calibration": CALIBRATION}
        _write(options.out, {"setting": setting() | kept_, "modelled": rows})


def _write(path: str, what: Any) -> None:
    with open(path, "w") as file:
        json.dump(what, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
