"""How the TPU kernels of grouped matmul cut their work: tiles of rows and the visits to them.

Rows are cut into tiles at multiples of `tm`. A tile in which groups meet is visited once for each
of them. Tiles do not depend on the sizes of groups, visits do; so the number of grid steps is data.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._block_sparse_tpu import LANES, MOST_PREFETCHED, tile_room
from pallas_kernels._compat import Tpu, tpu

UNROLLED = 2**14  # weights multiplied without a loop, times the side of the MXU


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work of a kernel is cut.

    Attributes:
        tm: Rows of a tile.
        tn: Columns of the result that a step computes.
        tk: Contracted columns multiplied at a time; of dW, the rows of the result of a step.
        cores: TensorCores that share a call.
    """

    tm: int
    tn: int
    tk: int
    cores: int = 1


class Visits(NamedTuple):
    """Visits of V = tiles + E places to tiles of rows, in the order of the rows.

    Attributes:
        turn: int32 `[V]`, which entry of `groups` the visit is for.
        tile: int32 `[V]`.
        lo: int32 `[V]`, first row of the group, within the tile.
        hi: int32 `[V]`, the row after the last; `lo` if the visit has no rows.
        groups: int32 `[E + 1]`, groups in order, and in the places not in use E.
        used: int32 `[1]`, how many entries of `groups` are in use.
        steps: int32 scalar, how many visits there are.
    """

    turn: jax.Array
    tile: jax.Array
    lo: jax.Array
    hi: jax.Array
    groups: jax.Array
    used: jax.Array
    steps: jax.Array


def visits(group_sizes: jax.Array, t: int, tm: int, *, empty: bool = False) -> Visits:
    """The visits to tiles of tm of t rows.

    Without `empty` only groups that have rows are used, and tiles past all of them get one visit
    without rows, so that every tile is visited. With it every group is, those without rows by one
    visit without rows.
    """
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, t)
    e, tiles = sizes.shape[0], -(-t // tm)
    stops = jnp.minimum(jnp.cumsum(sizes), t)
    firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), stops[:-1]])
    begin = firsts // tm
    counts = jnp.where(stops > firsts, -(-stops // tm) - begin, 0)
    if empty:
        uses, counts = jnp.ones(e, bool), jnp.maximum(counts, 1)
        past = jnp.array(tiles, jnp.int32)
    else:
        uses, past = counts > 0, -(-stops[-1] // tm)
    # The tiles past all groups are one line more.
    counts = jnp.append(counts, tiles - past)
    begin = jnp.append(begin, past)
    firsts, stops = jnp.append(firsts, 0), jnp.append(stops, 0)
    ends = jnp.cumsum(counts)
    place = jnp.arange(tiles + e, dtype=jnp.int32)
    line = jnp.minimum(jnp.searchsorted(ends, place, side="right"), e).astype(jnp.int32)
    tile = jnp.clip(begin[line] + place - (ends - counts)[line], 0, tiles - 1)
    lo = jnp.clip(firsts[line] - tile * tm, 0, tm)
    hi = jnp.maximum(lo, jnp.clip(stops[line] - tile * tm, 0, tm))
    upto = jnp.cumsum(uses, dtype=jnp.int32)  # groups in use, up to and with each
    groups = jnp.searchsorted(upto, jnp.arange(1, e + 2, dtype=jnp.int32)).astype(jnp.int32)
    turn = jnp.append(upto - uses, upto[-1])[line]
    return Visits(turn, tile, lo, hi, groups, upto[-1:], ends[-1].astype(jnp.int32))


def product_bytes(config: Config, depth: int, item: int) -> int:
    """VMEM of x @ w_g: 2 tiles of x, 2 matrices, sums and their addend, 2 tiles of the result."""
    tm, tn = config.tm, config.tn
    return 2 * (tm + tn) * depth * item + 2 * tm * tn * (4 + item)


def gradient_bytes(config: Config, item: int) -> int:
    """VMEM of dW: 2 tiles of x and dy, masked and turned copies, sums, addend, 2 results."""
    tm, tn, tk = config.tm, config.tn, config.tk
    return 4 * tm * (tn + tk) * item + tk * tn * (8 + 2 * item)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _even(size: int, most: int, multiple: int) -> int:
    """Length of pieces of at most `most`, as equal as multiples allow."""
    return _up(-(-size // -(-size // most)), multiple)


def _divisor(size: int, most: int) -> int:
    """The largest multiple of LANES that divides a multiple of LANES, and is at most `most`."""
    lanes = size // LANES
    return LANES * max(d for d in range(1, lanes + 1) if lanes % d == 0 and d * LANES <= most)


def rows_of(t: int, e: int, device: Tpu, item: int) -> int:
    """Rows of a tile: as many as the MXU needs, if the mean group is not smaller."""
    least = 32 // item
    tm = 128 if device.mxu == LANES else 256
    while tm > least and tm // 2 >= t / e:
        tm //= 2
    return min(tm, _up(t, least))


def _cores(size: int, piece: int, device: Tpu) -> int:
    """Cores among which the pieces of an axis can be shared evenly: all or one."""
    return device.cores if -(-size // piece) % device.cores == 0 else 1


def choose_config(
    t: int, e: int, depth: int, n: int, dtype: Any, device: Tpu, *, gradient: bool = False
) -> Config:
    """Tiles for x [t, depth] and matrices [e, depth, n], or for their gradient.

    A product takes as many columns as fit, for x is read once for every tile of columns; and whole
    rows of x, so that a matrix is read once. dW takes tiles of one size in both directions.

    Raises:
        NotImplementedError: If not even the least tiles fit.
    """
    item, room = jnp.dtype(dtype).itemsize, tile_room(device)
    tm = rows_of(t, e, device, item)
    if gradient:
        side = 2048
        while True:
            # Where the MXU is narrow, less suffices for HBM, and programs are shorter.
            most = side if device.mxu > LANES else max(LANES, side // 2)
            tk = _even(-(-depth // device.cores), most, LANES)
            config = Config(tm, _even(n, side, LANES), tk, _cores(depth, tk, device))
            if gradient_bytes(config, item) <= room or side == LANES:
                return config
            side //= 2
    tn = 2048
    while True:
        width = _even(-(-n // device.cores), tn, LANES)
        tk = _divisor(depth, max(LANES, UNROLLED * device.mxu // width))
        config = Config(tm, width, tk, _cores(n, width, device))
        size = product_bytes(config, depth, item)
        if size <= room:
            return config
        if tn == LANES:
            raise NotImplementedError(
                f"grouped_matmul on TPU holds whole rows of x and {LANES} columns of a matrix in "
                f"VMEM; with rows of {depth} that takes {size} bytes, and there are {room}. Split "
                "the contracted axis, or take implementation='xla'."
            )
        tn //= 2


def supports(dtype: Any, t: int, e: int, k: int, n: int) -> str:
    """Why the kernels cannot take t rows and matrices [e, k, n], or "" if they can."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16; got {jnp.dtype(dtype)}"
    if k % LANES or n % LANES:
        return f"the TPU kernels need matrices of multiples of {LANES}; got {k} x {n}"
    try:
        for depth, width in ((k, n), (n, k)):
            config = choose_config(t, e, depth, width, dtype, tpu())
    except NotImplementedError as error:
        return str(error)
    lists = 4 * (-(-t // config.tm) + e) + e + 2
    if lists > MOST_PREFETCHED:
        return (
            f"the TPU kernels hold lists in scalar memory, {MOST_PREFETCHED} integers; {t} rows in "
            f"{e} groups take {lists}"
        )
    return ""
