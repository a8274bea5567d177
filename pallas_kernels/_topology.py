"""Where stored blocks stand, and the orders in which kernels visit them. All on the device.

A weight [K, N] in blocks [bk, bn] is a grid of R = K / bk block rows and C = N / bn block columns.
Slot s stores the block at (rows[s], cols[s]); a slot not in use has row R. Values are never
permuted: kernels follow the orders `by_col` and `by_row`, so a new topology costs two small sorts,
no copy of a weight, and no recompile.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "cols", "by_col", "col_start", "by_row", "row_start"],
    meta_fields=["fan_in"],
)
@dataclasses.dataclass(frozen=True)
class Topology:
    """Block coordinates of S slots, and their orders. Leading axes are stacked weights.

    Attributes:
        rows: int32 `[..., S]`, block row of each slot; R where the slot is not in use.
        cols: int32 `[..., S]`, block column of each slot.
        by_col: int32 `[..., S]`, slots in order of (column, row); those not in use come last.
        col_start: int32 `[..., C + 1]`, where each column begins in `by_col`; the last is the
            number of slots in use.
        by_row: int32 `[..., S]`, slots in order of (row, column); those not in use come last.
        row_start: int32 `[..., R + 1]`, where each row begins in `by_row`.
        fan_in: Static. If given, column c owns the slots c * fan_in to (c + 1) * fan_in - 1, so
            that the shapes alone tell the columns; S = C * fan_in.

    Example:
        >>> from pallas_kernels import plan
        >>> topology = plan(jnp.array([1, 0, 1]), jnp.array([0, 1, 1]), (2, 2))
        >>> topology.by_row.tolist(), topology.row_start.tolist()
        ([1, 0, 2], [0, 1, 3])
    """

    rows: jax.Array
    cols: jax.Array
    by_col: jax.Array
    col_start: jax.Array
    by_row: jax.Array
    row_start: jax.Array
    fan_in: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C), the size of the weight in blocks."""
        return self.row_start.shape[-1] - 1, self.col_start.shape[-1] - 1

    @property
    def slots(self) -> int:
        """S, how many blocks can be stored."""
        return self.rows.shape[-1]

    @property
    def used(self) -> jax.Array:
        """Bool `[..., S]`: slots that hold a block of the weight."""
        return self.rows < self.grid[0]

    @property
    def block_map(self) -> jax.Array:
        """Bool `[..., R, C]`: the blocks that are stored."""

        def one(rows: jax.Array, cols: jax.Array) -> jax.Array:
            return jnp.zeros(self.grid, bool).at[rows, cols].set(True, mode="drop")

        for _ in self.rows.shape[:-1]:
            one = jax.vmap(one)
        return one(self.rows, self.cols)

    @property
    def count(self) -> jax.Array:
        """int32 `[...]`: how many slots are in use."""
        return self.col_start[..., -1]


def plan(
    rows: jax.Array, cols: jax.Array, grid: tuple[int, int], *, fan_in: int | None = None
) -> Topology:
    """The topology of blocks at (rows, cols), in any order, under jit or not.

    Args:
        rows: Integers `[..., S]`, 0 to R - 1; any other value marks a slot as not in use.
        cols: Integers `[..., S]`, 0 to C - 1.
        grid: (R, C), the size of the weight in blocks.
        fan_in: Say that column c owns the slots c * fan_in to (c + 1) * fan_in - 1.

    Raises:
        ValueError: If shapes do not fit, or R * C does not fit int32.

    Example:
        >>> from pallas_kernels import plan
        >>> int(plan(jnp.array([0, 9]), jnp.array([0, 0]), (2, 2)).count)
        1

    Cost: two sorts of S integers.
    """
    r, c = grid
    if rows.shape != cols.shape:
        raise ValueError(f"rows {rows.shape} and cols {cols.shape} must have one shape.")
    if r * c >= 2**31:
        raise ValueError(f"a grid of {r} x {c} blocks exceeds 2**31 - 1; take larger blocks.")
    if fan_in is not None and rows.shape[-1] != c * fan_in:
        raise ValueError(
            f"fan_in={fan_in} in {c} block columns takes {c * fan_in} slots; got {rows.shape[-1]}."
        )
    rows, cols = rows.astype(jnp.int32), cols.astype(jnp.int32)
    used = (rows >= 0) & (rows < r) & (cols >= 0) & (cols < c)
    rows = jnp.where(used, rows, r)

    def order(key: jax.Array, size: int, lines: int) -> tuple[jax.Array, jax.Array]:
        key = jnp.where(used, key, r * c)

        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            slots = jnp.argsort(key, stable=True).astype(jnp.int32)
            edges = jnp.arange(lines + 1, dtype=jnp.int32) * size
            return slots, jnp.searchsorted(key[slots], edges).astype(jnp.int32)

        for _ in key.shape[:-1]:
            one = jax.vmap(one)
        return one(key)

    by_col, col_start = order(cols * r + rows, r, c)
    by_row, row_start = order(rows * c + cols, c, r)
    return Topology(rows, cols, by_col, col_start, by_row, row_start, fan_in)


def check_topology(topology: Topology) -> None:
    """Raise if two slots in use stand at one place, or a `fan_in` does not tell the columns.

    Kernels take that for granted. On the host; under `jax.experimental.checkify` also inside jit,
    and in plain jit it does nothing.

    Raises:
        ValueError: Names the place, the slots and the mend.

    Example:
        >>> from pallas_kernels import check_topology, plan
        >>> check_topology(plan(jnp.array([0, 1]), jnp.array([0, 0]), (2, 2)))
    """
    (r, c), rows, cols = topology.grid, topology.rows, topology.cols
    key = jnp.where(topology.used, cols * r + rows, r * c)
    ordered = jnp.sort(key, -1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < r * c)
    place = jnp.max(jnp.where(twice, ordered[..., 1:], -1), initial=-1)
    own = jnp.array(True)
    if topology.fan_in is not None:
        column = jnp.arange(topology.slots, dtype=jnp.int32) // topology.fan_in
        own = jnp.all((cols == column) | ~topology.used)
    if isinstance(place, Tracer):
        twice_stored = "two slots store block {place} (column * R + row)"
        checkify.debug_check(place < 0, twice_stored, place=place)
        checkify.debug_check(own, "a slot stands outside the column that fan_in gives it")
        return
    if int(place) >= 0:
        row, column = int(place) % r, int(place) // r
        slots = jnp.flatnonzero((rows == row) & (cols == column)).tolist()
        raise ValueError(
            f"slots {slots} all store the block at row {row}, column {column}; a place may be "
            f"stored once. Give spare slots the row {r}, which marks them as not in use."
        )
    if not own:
        raise ValueError(
            f"fan_in={topology.fan_in} says that column c owns the slots c * fan_in to "
            "(c + 1) * fan_in - 1, but a slot stands in another column. Order slots by column, or "
            "leave fan_in out."
        )


class Visits(NamedTuple):
    """Stored blocks in the order in which a kernel meets them, `group` of one output block a step.

    Attributes:
        slot: int32 `[steps, group]`; where there is no block, any slot.
        source: int32 `[steps, group]`, block index along the contracted axis, always in range.
        live: bool `[steps, group]`, whether there is a block.
        out: int32 `[steps]`, output block of the step, not decreasing; every one occurs.
        steps: int32 scalar, how many steps have work; the rest have no live entry.
    """

    slot: jax.Array
    source: jax.Array
    live: jax.Array
    out: jax.Array
    steps: jax.Array


def visits(topology: Topology, group: int, *, transpose: bool = False) -> Visits:
    """Visit lists for x @ W, or for y @ W^T with `transpose`.

    An output block without stored blocks gets one step without live entries, so that it is written.
    There are `S // group + outs` steps, enough for every topology of S slots. No leading axes.
    """
    start, order, source = (
        (topology.row_start, topology.by_row, topology.cols)
        if transpose
        else (topology.col_start, topology.by_col, topology.rows)
    )
    return visits_of_lines(
        start[:-1], start[1:], order, source, topology.grid[1 if transpose else 0], group
    )


def visits_of_lines(
    begin: jax.Array,
    end: jax.Array,
    order: jax.Array,
    source: jax.Array,
    contracted: int,
    group: int,
) -> Visits:
    """Visit lists for output blocks o that have the slots order[begin[o]] to order[end[o] - 1].

    `source` [S] is the block index of a slot along the contracted axis, of `contracted` blocks.
    """
    outs, slots = begin.shape[0], order.shape[0]
    counts = end - begin
    ends = jnp.cumsum(jnp.maximum(1, -(-counts // group)))
    step = jnp.arange(slots // group + outs, dtype=jnp.int32)
    out = jnp.minimum(jnp.searchsorted(ends, step, side="right"), outs - 1).astype(jnp.int32)
    first = jnp.where(out > 0, ends[out - 1], 0)
    entry = begin[out] + (step - first) * group
    entry = entry[:, None] + jnp.arange(group, dtype=jnp.int32)
    live = (entry < end[out][:, None]) & (step < ends[-1])[:, None]
    slot = order[jnp.clip(entry, 0, slots - 1)]
    source = jnp.minimum(source[slot], contracted - 1)
    return Visits(slot, source, live, out, ends[-1].astype(jnp.int32))
