"""What the Hopper kernels of block-sparse attention share: scores, products, rings, launch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._attention_plan import Form, allowed
from pallas_kernels._attention_walk_gpu import (
    GROUPS,
    Config,
    Operands,
    Shape,
    Step,
    Walk,
    step_of,
    walk,
)
from pallas_kernels._block_sparse_gpu import tiled
from pallas_kernels._compat import gpu_row
from pallas_kernels._op import vary_alike

LOG2E = math.log2(math.e)
LEAST = -1e30  # where a running maximum begins: finite, so that -inf less it is -inf, not NaN
# 65,536 registers among 3 x 128 threads; both must be multiples of 8.
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 24, 240


def multiplier(form: Form) -> float:
    """Positive c such that the score, without bias, is c log(2) times what `raw_scores` gives."""
    if form.softcap is not None:
        return abs(form.softcap) * LOG2E
    return LOG2E * (form.scale if form.scale > 0 else 1)


def raw_scores(form: Form, products: jax.Array) -> jax.Array:
    """Scores over `multiplier`, from q k^T: q k^T itself, or its tanh if the scores are capped."""
    if form.softcap is not None:
        # By exp2, since the tanh of the device is good for 11 bits only.
        power = jnp.exp2(products * (2 * LOG2E * form.scale / abs(form.softcap)))
        return 1 - 2 / (power + 1)
    return products if form.scale > 0 else products * form.scale


def hidden_out(
    shape: Shape, operands: Operands, raw: jax.Array, walk: Walk, step: Step
) -> jax.Array:
    """Raw scores of a step in a partial block, -inf where a query must not see a key.

    They are `[queries, keys]`, or `[keys, queries]` by key.
    """
    transposed, firsts = shape.by_key, (walk.first, step.first)
    q_first, k_first = firsts[::-1] if transposed else firsts
    raw = plgpu.layout_cast(raw, plgpu.Layout.WGMMA)
    b = lax.div(walk.unit, jnp.int32(shape.a))

    def along(axis: int, source: Any, first: jax.Array | int) -> jax.Array:
        line = gpu_row(source.at[pl.ds(first, raw.shape[axis])], axis)
        return lax.broadcast_in_dim(line, raw.shape, (axis,))

    segments = []
    if operands.q_segments is not None:
        q_at, k_at = shape.of(b, 3) * shape.t + q_first, shape.of(b, 4) * shape.s + k_first
        segments = [
            along(int(transposed), operands.q_segments, q_at),
            along(int(not transposed), operands.k_segments, k_at),
        ]
    down = plgpu.broadcasted_iota(jnp.int32, raw.shape, 0, layout=plgpu.Layout.WGMMA) + firsts[0]
    across = along(1, operands.places, 0) + firsts[1]
    seen = allowed(
        shape.form,
        jnp.int32(0) if operands.kind is None else operands.kind[step.entry],
        *((across, down) if transposed else (down, across)),
        jnp.int32(0) if operands.offset is None else operands.offset[shape.of(b, 2)],
        *segments,
    )
    return jnp.where(seen, raw, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that the fetching warpgroup fills and others empty, step by step of a walk.

    Attributes:
        buffers: Shared memory, each `[lines * stages, ...]`.
        full: Barriers `[lines * stages]` that the copies complete.
        empty: Barriers `[lines * stages]` at which all readers of a line arrive.
        config: How many there are.
    """

    buffers: tuple[Any, ...]
    full: Any
    empty: Any
    config: Config

    def at(self, line: Any, step: jax.Array) -> jax.Array:
        """The buffer of a step."""
        stages = self.config.stages
        return line * stages + (lax.rem(step, jnp.int32(stages)) if stages > 1 else nought(step))

    def fill(self, line: int, step: jax.Array, sources: tuple[Any, ...]) -> None:
        """Fetch as soon as the buffer of the step is empty."""
        at = self.at(line, step)
        plgpu.barrier_wait(self.empty.at[at])
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[at], self.full.at[at])

    def wait(self, line: Any, step: jax.Array) -> tuple[Any, ...]:
        """The buffers of a step, once they are full."""
        at = self.at(line, step)
        plgpu.barrier_wait(self.full.at[at])
        return tuple(buffer.at[at] for buffer in self.buffers)

    def release(self, line: Any, step: jax.Array) -> None:
        """Say that this warpgroup has read the buffers of a step."""
        plgpu.barrier_arrive(self.empty.at[self.at(line, step)])

    def open(self, line: Any) -> None:
        """Say that all buffers are empty, as each reader does first."""
        for stage in range(self.config.stages):
            self.release(line, jnp.int32(stage))

    def close(self) -> None:
        """Wait until all buffers are empty, as the fetching warpgroup does last."""
        for at in range(self.config.lines * self.config.stages):
            plgpu.barrier_wait(self.empty.at[at])


def product(shape: tuple[int, int], a: Any, b: Any, issued: Callable[[], None] = lambda: None):
    """The product a @ b of two tiles in shared memory; `issued` runs while it is under way."""

    def run(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, b)
        issued()
        return sums[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_product(sums: jax.Array, a: jax.Array, b: Any, interpreted: bool) -> jax.Array:
    """Sums + a @ b, for a in registers and b in shared memory."""
    if interpreted:  # which has no products from registers
        sums += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # since this read b as wgmma does not, see its races
        return sums
    start: Any = plgpu.WGMMAAccumulatorRef.init(sums)
    return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(start)


def fetch(
    shape: Shape, operands: Operands, item: jax.Array, rings: list[tuple[Ring, tuple[Any, ...]]]
) -> None:
    """Fill rings from arrays of tokens, list by list and step by step."""
    walks = [walk(shape, operands, item, number) for number in range(shape.config.lines)]

    def one(i: jax.Array, _: None) -> None:
        for mine in walks:

            @pl.when(i < mine.count)
            def _(mine=mine):
                rows = pl.ds(step_of(shape, operands, mine, i).row, shape.config.tile)
                for ring, sources in rings:
                    ring.fill(mine.number, i, tuple(source.at[rows] for source in sources))

    most = walks[0].count
    for mine in walks[1:]:
        most = jnp.maximum(most, mine.count)
    lax.fori_loop(0, most, one, None)
    for ring, _ in rings:
        ring.close()


def loops(shape: Shape, walk: Walk, step: Callable[..., Any], carry: Any) -> Any:
    """`step(i, carry, partial)` over full blocks, then over partial ones, if there can be."""
    carry = lax.fori_loop(0, walk.full, lambda i, c: step(i, c, False), carry)
    if shape.masked:
        carry = lax.fori_loop(walk.full, walk.count, lambda i, c: step(i, c, True), carry)
    return carry


def nought(i: jax.Array) -> jax.Array:
    """0 for a step i, which the compiler cannot know.

    It keeps the addresses of what stays in place over a loop in registers, two for each 16 columns
    of a tile; where there are none to spare, let the place depend on the step by this.
    """
    return lax.shift_right_logical(i, jnp.int32(30))


def by_warpgroup(fetch: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """Run `fetch` in the last warpgroup and `compute(warpgroup)` in the others."""
    group = lax.axis_index("warpgroup")

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
        fetch()

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
        compute(group)


def launch(
    kernel: Callable[..., None],
    name: str,
    items: int,
    operands: Any,
    out: tuple[Any, ...],
    scratch: list[Any],
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Run `kernel(item, operands, *out, *scratch)` on `items` CTAs; `operands` is a pytree."""
    leaves, tree = jax.tree.flatten(operands)

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        kernel(lax.axis_index("item"), given, *refs[len(leaves) :])

    body.__name__ = name
    results = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(items,),
        grid_names=("item",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # exp2 in one instruction
            reduction_scratch_bytes=0,  # sums and maxima of rows stay inside a warp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )(*leaves)
    # Inside shard_map the kernel loses that type.
    return tuple(vary_alike(result, *leaves)[0] for result in results)


def tile(count: int, rows: int, d: int, dtype: Any) -> Any:
    """Shared memory for `count` tiles `[rows, d]`."""
    return plgpu.SMEM((count, rows, d), dtype, transforms=tiled(d, dtype))
