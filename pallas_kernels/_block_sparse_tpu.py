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

from pallas_kernels import _tuned
from pallas_kernels._compat import Tpu, tpu
from pallas_kernels._op import in_turn as in_turn
from pallas_kernels._topology import Topology, Visits, visits

LANES = 128
STORED = (jnp.float8_e4m3fn, jnp.float8_e5m2)  # converted to the dtype of x in VMEM
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


def supports(dtype: Any, bk: int, bn: int, stored: Any = None) -> str:
    """Why the kernels cannot take blocks of [bk, bn], or "" if they can.

    Args:
        dtype: Of x.
        bk: Rows of a block.
        bn: Columns of a block.
        stored: Dtype of the values, if it is another.
    """
    if stored is not None and jnp.dtype(stored) not in (jnp.dtype(dtype), *STORED):
        names = ", ".join(jnp.dtype(kind).name for kind in STORED)
        return f"the TPU kernels take values of the dtype of x, or {names}; got {stored}"
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


def product_bytes(
    bm: int, group: int, depth: int, inner: int, outer: int, item: int, weights: int = 1
) -> int:
    """VMEM of x @ W: 2 panels, 2 groups of blocks, sums and their addend, 2 outputs, joined x.

    With 2 weights, a gated product, also the gate.
    """
    panels, blocks = 2 * bm * depth * item, 2 * group * inner * outer * item
    sums = bm * outer * 4 * (1 + weights)
    return panels + blocks + sums + bm * outer * 2 * item + bm * group * inner * item


def gradient_bytes(
    bm: int, group: int, strip: int, depth: int, inner: int, outer: int, item: int
) -> int:
    """VMEM of dW: x and its transpose, 2 tiles of dy, operand, sums, addend, 2 groups, zeros."""
    block = inner * outer
    tiles = 2 * bm * depth * item + 2 * bm * outer * item + group * inner * bm * item
    return tiles + (strip + 1) * group * block * 4 + (2 * group + 1) * block * item


def problem(
    m: int,
    depth: int,
    outs: int,
    block: tuple[int, int],
    slots: int,
    dtype: Any,
    gradient: bool,
    weights: int = 1,
) -> dict[str, Any]:
    """What measured tiles are kept under; see `_tuned.py`."""
    product = "block_sparse_matmul" if weights == 1 else "block_sparse_gated"
    return {
        "kernel": "block_sparse_gradient" if gradient else product,
        "block": list(block),
        "dtype": jnp.dtype(dtype).name,
        "depth": depth,
        "rows": m,
        "live": max(1, -(-slots // outs)),
    }


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
    weights: int = 1,
) -> Config:
    """Tiles for x [m, depth] and `slots` blocks in `outs` columns of blocks.

    Those measured to be best for this device and a shape like this one, if there are any that fit;
    else by arithmetic, see `default_config`.

    Args:
        m: Rows of x.
        depth: Length of a row of x: K, or N for x @ W^T.
        outs: Block columns, or block rows for x @ W^T.
        block: Size of a block along the rows of x, and of the output.
        slots: Blocks stored.
        dtype: Of x and of the values.
        device: From `tpu`.
        gradient: For dW instead of a product.
        weights: 2 for a gated product, whose `outs` and `slots` are of both weights.

    Raises:
        NotImplementedError: If not even the fewest rows fit.
    """
    sizes = m, depth, outs, block, slots, dtype
    default = default_config(*sizes, device, gradient=gradient, weights=weights)
    found = _tuned.tiles(device.name, problem(*sizes, gradient, weights))
    if found is None:
        return default
    config, item = Config(**found), jnp.dtype(dtype).itemsize
    bm = _even_rows(
        m, config.bm, 1 if gradient else device.cores, LANES if gradient else 32 // item
    )
    config = dataclasses.replace(config, bm=bm)
    size = needs(config, depth, block, item, gradient=gradient, weights=weights)
    fits = size <= tile_room(device) and config.cores == device.cores
    return config if fits else default


def needs(
    config: Config,
    depth: int,
    block: tuple[int, int],
    item: int,
    *,
    gradient: bool,
    weights: int = 1,
) -> int:
    """VMEM that a kernel with these tiles takes, in bytes."""
    if gradient:
        return gradient_bytes(config.bm, config.group, config.strip, depth, *block, item)
    return product_bytes(config.bm, config.group, depth, *block, item, weights)


def tile_room(device: Tpu) -> int:
    """Bytes of VMEM for what a kernel keeps; the rest is the compiler's."""
    return device.vmem * 3 // 4


def _even_rows(m: int, bm: int, cores: int, least: int) -> int:
    """As few rows of padding as the panels that `bm` needs allow."""
    rows = -(-m // cores)
    return _up(-(-rows // -(-rows // bm)), least)


def default_config(
    m: int,
    depth: int,
    outs: int,
    block: tuple[int, int],
    slots: int,
    dtype: Any,
    device: Tpu,
    *,
    gradient: bool = False,
    weights: int = 1,
) -> Config:
    """Tiles for a device that nobody measured; arguments as in `choose_config`.

    A step takes 2^18 weights, or 2^19 where the MXU is 256 wide: that hides what it costs by
    itself, 150 to 230 cycles, and more would only lengthen the program. Rows are halved until what
    the kernel keeps fits three quarters of VMEM; the rest is the compiler's.
    """
    (inner, outer), item = block, jnp.dtype(dtype).itemsize
    room = tile_room(device)
    most = max(1, min(8, 2**11 * device.mxu // (inner * outer)))
    mean = max(1, -(-slots // outs))
    group = -(-mean // -(-mean // most))  # as few steps a column as `most` allows, evenly filled
    shape = {"group": group, "depth": depth, "inner": inner, "outer": outer, "item": item}
    size = partial(gradient_bytes, strip=1) if gradient else partial(product_bytes, weights=weights)
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
    bm = _even_rows(m, bm, 1 if gradient else device.cores, least)
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
    return in_scalar_memory(lists, topology.slots, multiple)


def in_scalar_memory(lists: Visits, slots: int, multiple: int = 1) -> Lists:
    """Visits of `slots` slots for scalar memory, padded to a multiple of `multiple` steps."""
    steps, group = lists.slot.shape
    _check_lists(steps, group, slots)
    more = -steps % multiple
    slot, source = (jnp.pad(a, ((0, more), (0, 0))).reshape(-1) for a in (lists.slot, lists.source))
    count = jnp.pad(lists.live.sum(1, dtype=jnp.int32), (0, more))
    return Lists(slot, source, jnp.pad(lists.out, (0, more), mode="edge"), count, lists.steps)


def _check_lists(steps: int, group: int, slots: int) -> None:
    if steps * (2 * group + 2) + slots > MOST_PREFETCHED:
        raise NotImplementedError(
            f"block_sparse_matmul on TPU holds its lists in scalar memory, {MOST_PREFETCHED} "
            f"integers; {slots} slots take more. Take larger blocks."
        )


def too_large(
    m: int, topology: Topology, block: tuple[int, ...], dtype: Any, up: Topology | None = None
) -> str:
    """Why a product of m rows, or one of its gradients, does not fit a core, or "" if all do.

    With `up` the product is gated, and `topology` is of the gate.
    """
    (bk, bn) = block
    work: list[tuple[Any, dict[str, Any]]] = []
    for (r, c), slots in ((t.grid, t.slots) for t in (topology, up) if t is not None):
        forward, dx = (m, r * bk, c, (bk, bn), slots), (m, c * bn, r, (bn, bk), slots)
        work += [(forward, {}), (dx, {}), (forward, {"gradient": True})]
    if up is not None:
        (r, c), slots = up.grid, topology.slots + up.slots
        work.append(((m, r * bk, 2 * c, (bk, bn), slots), {"weights": 2}))
    try:
        for sizes, options in work:
            _, _, outs, _, slots = sizes
            config = choose_config(*sizes, dtype=dtype, device=tpu(), **options)
            _check_lists(slots // config.group + outs, config.group, slots)
    except NotImplementedError as error:
        return str(error)
    return ""


def when(condition: Any, body: Any) -> None:
    """Call body() if the condition holds; without a branch if that is known."""
    body() if condition is True else pl.when(condition)(body)


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


def cost(m: int, weights: int, moved: int) -> pl.CostEstimate:
    """For the scheduler of XLA: m rows times that many weights, and bytes from and to HBM."""
    return pl.CostEstimate(flops=2 * m * weights, bytes_accessed=moved, transcendentals=0)


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
