"""How the Hopper kernels of block-sparse matmul cut their work: tiles, the ring, and the way out.

A CTA is three warpgroups: one fetches with TMA and two multiply with wgmma, each its own tile of
`rows` x `cols` sums in registers. As many CTAs as there are SMs take tiles in turn. Operands pass
through a ring of `stages` buffers that runs on from tile to tile, so that the first operands of a
tile arrive while the one before is multiplied and written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import streaming_multiprocessors
from pallas_kernels._op import vary_alike

DEPTH = 64  # contracted elements a step: 16 bits each, the 128 bytes of a swizzled line
GROUPS = 2  # warpgroups that multiply
MOST_SUMS = 128 * 128  # float32 sums of a warpgroup; with more it spills
SHARED_MEMORY = 232_448  # bytes that a CTA may use
CHUNK_BYTES = 64 * DEPTH * 2  # what a warpgroup writes at a time
MOST_STAGES = 6
_BARRIERS = 1024  # bytes set aside for them and for alignment
# 65,536 registers among 3 x 128 threads; both must be multiples of 8.
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut; see the head of the file.

    Attributes:
        rows: Rows of the tile of a multiplying warpgroup, 64 or 128.
        cols: Columns of it, a multiple of 64 that divides the block.
        stages: Buffers of the ring.
        sms: CTAs.
        splits: Parts into which the rows of x are cut; dW only.
    """

    rows: int
    cols: int
    stages: int
    sms: int
    splits: int = 1


def supports(dtype: Any, bk: int, bn: int) -> str:
    """Why the kernels cannot take blocks of [bk, bn], or "" if they can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the GPU kernels take bfloat16 and float16; got {jnp.dtype(dtype)}"
    if bk % DEPTH or bn % DEPTH:
        return f"the GPU kernels need blocks of multiples of {DEPTH}; got {bk} x {bn}"
    return ""


def check(values: jax.Array) -> None:
    """Raise NotImplementedError for values that `supports` refuses."""
    reason = supports(values.dtype, *values.shape[-2:])
    if reason:
        raise NotImplementedError(f"block_sparse_matmul: {reason}. Take implementation='xla'.")


def _part(size: int, most: int) -> int:
    """The largest multiple of 64 up to `most` that divides `size`."""
    return max(part for part in range(64, most + 1, 64) if size % part == 0)


def shared_bytes(rows: int, cols: int, stages: int) -> int:
    """Shared memory: the ring, and two chunks on the way out for each warpgroup."""
    return stages * (GROUPS * rows + cols) * DEPTH * 2 + 2 * GROUPS * CHUNK_BYTES


def _stages(rows: int, cols: int) -> int:
    room = SHARED_MEMORY - _BARRIERS
    return max(n for n in range(2, MOST_STAGES + 1) if shared_bytes(rows, cols, n) <= room)


def choose_config(m: int, batch: int, outs: int, outer: int) -> Config:
    """Tiles of x @ W for x [m, ...] and `outs` output blocks, `outer` wide, of `batch` weights."""
    sms = streaming_multiprocessors()
    cols = _part(outer, 256)
    rows = 128 if 128 * cols <= MOST_SUMS else 64
    while rows > 64 and batch * outs * (outer // cols) * -(-m // (GROUPS * rows)) < sms:
        rows //= 2
    return Config(rows, cols, _stages(rows, cols), sms)


def choose_gradient_config(m: int, slots: int, block: tuple[int, int]) -> Config:
    """Tiles of dW for x [m, ...] and `slots` stored blocks, over all weights."""
    sms = streaming_multiprocessors()
    rows = _part(block[0], 128)
    cols = _part(block[1], MOST_SUMS // rows)
    # Where pairs of tiles are fewer than CTAs, several share one, at least 8 steps each.
    pairs = max(1, -(-slots * (block[0] // rows) * (block[1] // cols) // GROUPS))
    splits = max(1, min(sms // pairs, m // (8 * DEPTH)))
    return Config(rows, cols, _stages(rows, cols), sms, splits)


def tiled(minor: int, dtype: Any) -> tuple[Any, Any]:
    """The layout in shared memory that TMA and wgmma share, for a tile whose last axis is `minor`.

    Lines of at most 128 bytes, in groups of eight, swizzled.
    """
    item = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(minor * item * 8)
    return plgpu.TilingTransform((8, swizzle // item)), plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that one warpgroup fills and two empty, in the order of a running count of steps.

    Attributes:
        full: Barriers `[stages]` that TMA completes.
        empty: Barriers `[stages]` at which both multiplying warpgroups arrive.
        stages: How many buffers there are.
    """

    full: Any
    empty: Any
    stages: int

    def fill(self, step: jax.Array, fetch: Callable[[jax.Array, Any], None]) -> None:
        """Fetch into the buffer of `step` as soon as it is empty."""
        at = lax.rem(step, self.stages)
        plgpu.barrier_wait(self.empty.at[at])
        fetch(at, self.full.at[at])

    def open(self) -> None:
        """Say that all buffers are empty, as each multiplying warpgroup does first."""
        for at in range(self.stages):
            plgpu.barrier_arrive(self.empty.at[at])

    def close(self) -> None:
        """Wait until all buffers are empty, as the fetching warpgroup does last."""
        for at in range(self.stages):
            plgpu.barrier_wait(self.empty.at[at])

    def multiply(
        self, step: jax.Array, steps: jax.Array, product: Callable[[jax.Array], None]
    ) -> None:
        """Run `product(buffer)`, one wgmma, for `steps` steps from `step` on; one stays in flight.

        So a buffer is free one step late, and the last one at the end.
        """

        def release(step: jax.Array) -> None:
            plgpu.barrier_arrive(self.empty.at[lax.rem(step, self.stages)])

        def one(i: jax.Array, _: None) -> None:
            at = lax.rem(step + i, self.stages)
            plgpu.barrier_wait(self.full.at[at])
            product(at)
            plgpu.wgmma_wait(1)
            pl.when(i > 0)(lambda: release(step + i - 1))

        lax.fori_loop(0, steps, one, None)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: release(step + steps - 1))

    def skip(self, step: jax.Array, steps: jax.Array) -> None:
        """Let `steps` buffers pass, for a warpgroup without work."""

        def one(i: jax.Array, _: None) -> None:
            at = lax.rem(step + i, self.stages)
            plgpu.barrier_wait(self.full.at[at])
            plgpu.barrier_arrive(self.empty.at[at])

        lax.fori_loop(0, steps, one, None)


def store(
    sums: jax.Array, out: Any, chunks: Any, finish: Callable[[jax.Array, int], jax.Array]
) -> None:
    """Write the sums of a warpgroup to `out` in global memory, in chunks through shared memory.

    Args:
        sums: `[rows, cols]` float32.
        out: Reference of the same shape.
        chunks: Shared memory `[2, 64, width]`; one is filled while the other leaves.
        finish: (sums of a chunk, its first column) -> what is written.
    """
    rows, cols = sums.shape
    _, height, width = chunks.shape
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i, row in enumerate(range(0, rows, height)):
        for j, col in enumerate(range(0, cols, width)):
            chunk = chunks.at[(i * (cols // width) + j) % 2]
            part = finish(sums[row : row + height, col : col + width], col)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            chunk[...] = part.astype(chunk.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(chunk, out.at[pl.ds(row, height), pl.ds(col, width)])


def run(
    ring: Ring,
    items: int,
    sms: int,
    fetch: Callable[[jax.Array, jax.Array], jax.Array],
    compute: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> None:
    """Go over `items` tiles, CTA by CTA, with the three warpgroups.

    Args:
        ring: Carries the operands.
        items: Number of tiles.
        sms: Number of CTAs.
        fetch: (tile, step) -> step after the tile; fills the ring.
        compute: (warpgroup, tile, step) -> step after the tile; empties it.
    """
    cta, group = lax.axis_index("cta"), lax.axis_index("warpgroup")
    mine = lax.div(items - cta + (sms - 1), sms)

    def each(work: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
        lax.fori_loop(0, mine, lambda i, step: work(cta + i * sms, step), jnp.int32(0))

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
        each(fetch)
        ring.close()

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
        ring.open()
        each(partial(compute, group))
        plgpu.wait_smem_to_gmem(0)


def launch(
    kernel: Any,
    name: str,
    config: Config,
    out: Any,
    buffers: Any,
    copies: int,
    interpret: Any,
    operands: Any,
) -> Any:
    """Run `kernel(*operands, out, *buffers, chunks, full, empty)` on `config.sms` CTAs.

    `copies` is how many copies fill the buffers of a step.
    """
    item = jnp.dtype(out.dtype).itemsize
    chunk = (64, CHUNK_BYTES // (64 * item))
    kernel.__name__ = name
    result = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[
            *buffers,
            plgpu.SMEM((GROUPS, 2, *chunk), out.dtype, transforms=tiled(chunk[1], out.dtype)),
            plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=config.stages),
        ],
        grid=(config.sms,),
        grid_names=("cta",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        # Named, because JAX 0.10 has another default.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)
    return vary_alike(result, *operands)[0]  # inside shard_map the kernel loses that type


def padded(x: jax.Array) -> jax.Array:
    """X [B, M, K] with rows of zeros, so that M is a multiple of 8.

    Copies cut rows in eights. Beyond the last row they read zeros and write nothing, so that M need
    not be a multiple of a tile.
    """
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0))) if x.shape[1] % 8 else x


def divide(a: jax.Array, b: Any) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of two numbers that are not negative."""
    b = jnp.asarray(b, a.dtype)
    return lax.div(a, b), lax.rem(a, b)


def stacked(
    function: Callable[..., jax.Array], x: jax.Array, *rest: Any, more_rows: bool = False
) -> jax.Array:
    """`function(x, *rest)`, whose leaves have a leading axis B; vmap makes that axis longer.

    With `more_rows`, vmap over x [B, M, K] alone makes M longer, and y [B, M, N] likewise.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def _(size: int, batched: Any, x: jax.Array, *rest: Any):
        if more_rows and not any(jax.tree.leaves(batched[1:])):
            b, m = x.shape[1:3]
            wide = x.swapaxes(0, 1).reshape(b, size * m, -1)
            y = stacked(function, wide, *rest, more_rows=True)
            return y.reshape(b, size, m, -1).swapaxes(0, 1), True

        def joined(leaf: jax.Array, over: bool) -> jax.Array:
            leaf = leaf if over else jnp.broadcast_to(leaf, (size, *leaf.shape))
            return leaf.reshape(-1, *leaf.shape[2:])

        operands = jax.tree.map(joined, (x, *rest), tuple(batched))
        y = stacked(function, *operands, more_rows=more_rows)
        return y.reshape(size, -1, *y.shape[1:]), True

    return mapped(x, *rest)
