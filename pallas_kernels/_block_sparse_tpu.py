"""How the TPU kernels of block-sparse matmul cut their work: tiles, lists, and what they share."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._compat import Tpu
from pallas_kernels._topology import Topology, visits

LANES = 128
MOST_PREFETCHED = 250_000  # int32 in the 1 MiB of SMEM, less what the compiler keeps


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut; see the head of the file.

    Attributes:
        bm: Rows of x in VMEM at a time.
        group: Stored blocks a grid step.
        merge: Join the blocks of a step along the contracted axis: fills an MXU wider than a block.
        cores: TensorCores that share a call.
        strip: Steps whose gradients are summed in VMEM at a time; dW only.
    """

    bm: int
    group: int
    merge: bool = False
    cores: int = 1
    strip: int = 1


def supports(dtype: Any, bk: int, bn: int) -> str:
    """Why the kernels cannot take blocks of [bk, bn], or "" if they can."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16; got {jnp.dtype(dtype)}"
    if bk % LANES or bn % LANES:
        # Both are lanes of an operand: bk of x, bn of y, and in dx the other way round.
        return f"the TPU kernels need blocks of multiples of {LANES}; got {bk} x {bn}"
    return ""


class Lists(NamedTuple):
    """What a kernel reads from scalar memory; `slot`, `source`, `out` and `steps` as in `Visits`.

    Attributes:
        slot: int32 `[steps * group]`.
        source: int32 `[steps * group]`.
        out: int32 `[steps]`.
        count: int32 `[steps]`, how many entries of a step hold a block; they come first.
        steps: int32 scalar.
    """

    slot: jax.Array
    source: jax.Array
    out: jax.Array
    count: jax.Array
    steps: jax.Array


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def product_bytes(bm: int, group: int, depth: int, inner: int, outer: int, item: int) -> int:
    """VMEM of x @ W: 2 panels, 2 groups of blocks, sums and their addend, 2 outputs, joined x."""
    panels, blocks = 2 * bm * depth * item, 2 * group * inner * outer * item
    return panels + blocks + bm * outer * (4 + 4 + 2 * item) + bm * group * inner * item


def gradient_bytes(
    bm: int, group: int, strip: int, depth: int, inner: int, outer: int, item: int
) -> int:
    """VMEM of dW: x and its transpose, 2 tiles of dy, operand, sums, addend, 2 groups, zeros."""
    block = inner * outer
    tiles = 2 * bm * depth * item + 2 * bm * outer * item + group * inner * bm * item
    return tiles + (strip + 1) * group * block * 4 + (2 * group + 1) * block * item


def choose_config(
    m: int,
    depth: int,
    outs: int,
    block: tuple[int, int],
    slots: int,
    dtype: Any,
    device: Tpu,
    *,
    gradient: bool = False,
) -> Config:
    """Tiles for x [m, depth] and `slots` blocks in `outs` columns of blocks.

    A step takes 2^18 weights, or 2^19 where the MXU is 256 wide: that hides what it costs by
    itself, 150 to 230 cycles, and more would only lengthen the program. Rows are halved until what
    the kernel keeps fits three quarters of VMEM; the rest is the compiler's.

    Args:
        m: Rows of x.
        depth: Length of a row of x: K, or N for x @ W^T.
        outs: Block columns, or block rows for x @ W^T.
        block: Size of a block along the rows of x, and of the output.
        slots: Blocks stored.
        dtype: Of x and of the values.
        device: From `tpu`.
        gradient: For dW instead of a product.

    Raises:
        NotImplementedError: If not even the fewest rows fit.
    """
    (inner, outer), item = block, jnp.dtype(dtype).itemsize
    room = device.vmem * 3 // 4
    most = max(1, min(8, 2**11 * device.mxu // (inner * outer)))
    mean = max(1, -(-slots // outs))
    group = -(-mean // -(-mean // most))  # as few steps a column as `most` allows, evenly filled
    shape = {"group": group, "depth": depth, "inner": inner, "outer": outer, "item": item}
    size = partial(gradient_bytes, strip=1) if gradient else product_bytes
    size = partial(size, **shape)
    # Rows are lanes of the transposed x of dW, else sublanes.
    least = LANES if gradient else 32 // item
    # With more, the products bind and not the blocks' way from HBM.
    bm = 1024 if gradient or device.mxu == LANES else 2048
    while bm > least and size(bm) > room:
        bm //= 2
    # x takes a third of the room at most, else few sums fit, and x is read for many strips.
    while gradient and bm > 2 * LANES and 2 * bm * depth * item > room // 3:
        bm //= 2
    rows = m if gradient else -(-m // device.cores)
    bm = _up(-(-rows // -(-rows // bm)), least)  # as few rows of padding as that many panels allow
    if size(bm) > room:
        raise NotImplementedError(
            f"block_sparse_matmul on TPU holds {bm} rows of x in VMEM at least; with rows of "
            f"{depth} and blocks of {inner} x {outer} that takes {size(bm)} bytes, and there are "
            f"{room}. Take smaller blocks, split the contracted axis, or implementation='xla'."
        )
    if not gradient:
        # Joining pays for wide blocks; of square ones the products gain less than the moves cost.
        return Config(bm, group, inner < device.mxu <= outer, device.cores)
    steps = -(-outs * -(-mean // group) // device.cores)  # if all columns have as many blocks
    strip = 1 + (room - size(bm)) // (group * inner * outer * 4)
    strip = -(-steps // -(-steps // strip))  # strips of equal length
    return Config(bm, group, cores=device.cores, strip=strip)


def prefetched(topology: Topology, group: int, multiple: int, *, transpose: bool) -> Lists:
    """The visits of a topology for scalar memory, padded to a multiple of `multiple` steps."""
    lists = visits(topology, group, transpose=transpose)
    steps = lists.out.shape[0]
    if steps * (2 * group + 2) + topology.slots > MOST_PREFETCHED:
        raise NotImplementedError(
            f"block_sparse_matmul on TPU holds its lists in scalar memory, {MOST_PREFETCHED} "
            f"integers; {topology.slots} slots take more. Take larger blocks."
        )
    more = -steps % multiple
    slot, source = (jnp.pad(a, ((0, more), (0, 0))).reshape(-1) for a in (lists.slot, lists.source))
    count = jnp.pad(lists.live.sum(1, dtype=jnp.int32), (0, more))
    return Lists(slot, source, jnp.pad(lists.out, (0, more), mode="edge"), count, lists.steps)


def each(count: Any, group: int, body: Any) -> None:
    """Call body(0) to body(count - 1), unrolled in the usual case of a full group."""

    @pl.when(count == group)
    def _():
        for member in range(group):
            body(member)

    @pl.when(count < group)
    def _():
        lax.fori_loop(0, count, lambda member, _: body(member), None)


def padded(x: jax.Array, multiple: int) -> jax.Array:
    """X with rows of zeros below, so that their number is a multiple."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0))) if x.shape[0] % multiple else x


def vmem_limit(device: Tpu) -> int:
    """Bytes of VMEM that a kernel may take."""
    return device.vmem * 15 // 16


def compiler_params(device: Tpu, axes: int) -> Any:
    """For a grid (cores, ...): each core goes in order, because copies reach into the next step."""
    semantics: Any = ("parallel", *["arbitrary"] * (axes - 1))
    return pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=vmem_limit(device),
        disable_bounds_checks=True,  # 50 to 200 cycles a step; interpret mode checks every copy
    )


def in_turn(run: Any, batched: Any, *operands: Any) -> jax.Array:
    """Map over a leading axis by a loop: a kernel with operands in HBM has no batched form."""
    leaves, tree = jax.tree.flatten(operands)
    over = jax.tree.leaves(batched)

    def one(slices: list[jax.Array]) -> jax.Array:
        rest = iter(slices)
        parts = [next(rest) if b else leaf for leaf, b in zip(leaves, over, strict=True)]
        return run(*jax.tree.unflatten(tree, parts))

    return lax.map(one, [leaf for leaf, b in zip(leaves, over, strict=True) if b])
