"""What the TPU kernels of block-sparse attention share: tiles, lists, the walk over a list, masks.

A kernel takes one list a grid step: the blocks of keys that a block of queries meets, or the other
way round. It works on tiles of up to `members` listed blocks, which lie anywhere in memory. Blocks
come either by hand-made DMA, one tile ahead, also across lists; or, where the whole other side of a
head fits VMEM (`resident`), by reading them where they are. Full blocks come first, in tiles that
no rule about tokens touches; then tiles of partial ones, the last of which is cut to the next of
`sizes`. What a tile has beyond its list repeats the last entry, and is masked.

Grid (cores, lists of a core). Lists come to scalar memory row by row, so they may be of any number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._attention_plan import Form
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_tpu import LANES, each

MASKED = -1e30  # not -inf: inf - inf is NaN in a row of which nothing is seen yet
LOG2E = math.log2(math.e)
FAR = 2**30  # position of a key that is not there
META = 3  # integers before the entries of a list: full, count, offset
_SIZES = (2, 4, 6, 8, 12, 16, 24, 32)  # each is a copy of the kernel's body
_KIND = 24  # an entry is its index, and its kind from this bit on


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut; see the head of the file.

    Attributes:
        own: Tokens of the block that a list belongs to.
        listed: Tokens of a listed block.
        lists: Lists of a unit.
        units: Of all batch entries and chunks of heads, with `lists` lists each.
        heads: Query heads of a unit that are worked on together.
        members: Listed blocks of a tile.
        cores: TensorCores that share a call.
        resident: Whether the listed side of a head is in VMEM as a whole.
        by_key: Whether the lists are of key blocks; then tokens of queries are lanes.
        batch: Entries.
        chunks: Of heads, that share a list.
        units_per_head: Units that share a key-value head.
    """

    own: int
    listed: int
    lists: int
    units: int
    heads: int
    members: int
    cores: int = 1
    resident: bool = False
    by_key: bool = False
    batch: int = 1
    chunks: int = 1
    units_per_head: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Members that a last tile may have, ascending."""
        return tuple(size for size in _SIZES if size < self.members) + (self.members,)

    @property
    def total(self) -> int:
        """Lists."""
        return self.units * self.lists

    @property
    def per_core(self) -> int:
        """Grid steps of a core; if they are not even, the last list is done twice."""
        return -(-self.total // self.cores)

    def at(self, core: Any, step: Any) -> Any:
        """Which list a grid step takes."""
        return jnp.minimum(core * self.per_core + step, self.total - 1)

    def size_of(self, live: Any) -> Any:
        """Members of a last tile of `live` entries."""
        size = jnp.int32(self.members)
        for smaller in self.sizes[-2::-1]:
            size = jnp.where(live <= smaller, smaller, size)
        return size


def packed(lists: BlockLists, offset: jax.Array) -> jax.Array:
    """Lists for scalar memory: int32 `[B or 1, A, R, 1, META + W]`."""
    batch = max(lists.index.shape[0], offset.shape[0])
    full, count = (x[..., None] for x in (lists.full, lists.count))
    entries = lists.index | (lists.kind << _KIND)
    rows = jnp.concatenate([full, count, jnp.zeros_like(full), entries], -1)
    rows = jnp.broadcast_to(rows, (batch, *rows.shape[1:]))
    return rows.at[..., 2].set(offset[:, None, None])[..., None, :]


def index_of(entry: Any) -> Any:
    """Index of a packed entry."""
    return entry & (2**_KIND - 1)


def kind_of(entry: Any) -> Any:
    """Kind of a packed entry."""
    return entry >> _KIND


@dataclasses.dataclass(frozen=True)
class Feed:
    """Hand-made copies of tiles, one tile ahead; see `walk`.

    Attributes:
        here: The list of this step.
        following: That of the next one.
        core: TensorCore.
        step: Grid step of the core.
        copies: (list number, index, buffer, member) -> [(from, to)] of one listed block.
        whole: (buffer, members) -> what these copies wrote.
        arrived: DMA semaphores [2].
        parity: SMEM [1], the buffer that the first tile of this list comes to.
    """

    here: Any
    following: Any
    core: Any
    step: Any
    copies: Callable[..., Any]
    whole: Callable[..., Any]
    arrived: Any
    parity: Any

    def fetch(self, plan: Plan, entries: Any, step: Any, tile: Any, to: Any) -> None:
        """Start the copies of a tile of the list of a step."""
        line, count = plan.at(self.core, step), entries[0, 0, 1]

        def start(member: Any) -> None:
            place = jnp.minimum(tile * plan.members + member, count - 1)
            index = index_of(entries[0, 0, META + place])
            for source, target in self.copies(line, index, to, member):
                _copy(source, target, self.arrived.at[to]).start()

        live = jnp.minimum(count - tile * plan.members, plan.members)
        each(plan.size_of(live), plan.members, start)

    def begin(self, plan: Plan, tiles: Any) -> Any:
        """The buffer of the first tile of this list; fills the pipeline where that is due."""

        @pl.when(self.step == 0)
        def _():
            self.parity[0] = 0
            pl.when(tiles > 0)(lambda: self.fetch(plan, self.here, self.step, 0, 0))

        first = self.parity[0]
        more = (self.step + 1 < plan.per_core) & (self.following[0, 0, 1] > 0)

        @pl.when((tiles == 0) & more)
        def _():
            self.fetch(plan, self.following, self.step + 1, 0, first)

        self.parity[0] = lax.rem(first + tiles, 2)
        return first

    def turn(self, plan: Plan, tile: Any, tiles: Any, size: int, at: Any) -> None:
        """Start the copies of the next tile, and wait for those of this one."""
        last = tile + 1 == tiles
        more = (self.step + 1 < plan.per_core) & (self.following[0, 0, 1] > 0)

        @pl.when(~last)
        def _():
            self.fetch(plan, self.here, self.step, tile + 1, 1 - at)

        @pl.when(last & more)
        def _():
            self.fetch(plan, self.following, self.step + 1, 0, 1 - at)

        for target in self.whole(at, size):
            _copy(target, target, self.arrived.at[at]).wait()


def _copy(source: Any, target: Any, semaphore: Any) -> Any:
    return pltpu.make_async_copy(source, target, semaphore)


def walk(plan: Plan, here: Any, work: Callable[..., None], feed: Feed | None) -> None:
    """Call work(tile, size, masked, buffer) for the tiles of a list; size and masked are static."""
    full, count, c = here[0, 0, 0], here[0, 0, 1], plan.members
    whole = lax.div(full, c)
    rest = count - whole * c
    last = lax.rem(rest, c)
    size = jnp.where(last > 0, plan.size_of(last), 0)
    masked = lax.div(rest, c) + (size == c).astype(jnp.int32)
    tiles = whole + lax.div(rest + c - 1, c)
    first = 0 if feed is None else feed.begin(plan, tiles)

    def turn(tile: Any, size: int, masked: bool) -> None:
        at = lax.rem(first + tile, 2)
        if feed is not None:
            feed.turn(plan, tile, tiles, size, at)
        work(tile, size, masked, at)

    lax.fori_loop(0, whole, lambda t, _: turn(t, c, False), None)
    lax.fori_loop(whole, whole + masked, lambda t, _: turn(t, c, True), None)
    for smaller in plan.sizes[:-1]:
        pl.when(size == smaller)(lambda smaller=smaller: turn(tiles - 1, smaller, True))


@dataclasses.dataclass(frozen=True)
class Tile:
    """Scalars of a tile, spread over its lanes; those of a listed block are `width` wide.

    Attributes:
        here: The list.
        first: Place of the first entry.
        size: Members.
        width: Lanes of a member.
        whole: Whether no member is beyond the end of the list.
    """

    here: Any
    first: Any
    size: int
    width: int
    whole: bool = False

    def place(self, member: Any) -> Any:
        """Place in the list, at most that of the last entry."""
        if self.whole:
            return self.first + member
        return jnp.minimum(self.first + member, self.here[0, 0, 1] - 1)

    def some(self, first: int, size: int) -> Tile:
        """The tile of some of the members."""
        return dataclasses.replace(self, first=self.first + first, size=size)

    def entry(self, member: Any) -> Any:
        """A packed entry."""
        return self.here[0, 0, META + self.place(member)]

    def live(self, member: Any) -> Any:
        """Whether a member is not beyond the end of the list."""
        return self.first + member < self.here[0, 0, 1]

    def lanes(self, scalar: Callable[[int], Any], dtype: Any) -> jax.Array:
        """[1, size * width] of a scalar a member."""
        return side_by_side([jnp.full((1, self.width), scalar(m), dtype) for m in range(self.size)])


def side_by_side(parts: list[jax.Array]) -> jax.Array:
    """Joined along lanes."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def stacked(parts: list[jax.Array]) -> jax.Array:
    """Joined along the last axis but one."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -2)


def column(row: jax.Array) -> jax.Array:
    """[1, n] as [n, 128], with all lanes alike."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def product(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    """A b, or a b^T with `contracted` = 1, in float32; of float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((1,), (contracted,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def factor(form: Form, biased: bool) -> float:
    """What `logits` leaves to multiply, so that a score costs no pass of its own."""
    plain = form.softcap is None and not biased and form.scale > 0
    return form.scale * LOG2E if plain else 1.0


def logits(
    form: Form, scores: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Products of q and k as exponents of 2, less `factor`; and tanh of the scores, if capped."""
    slope = None
    if form.softcap is not None:
        slope = jnp.tanh(scores * (form.scale / form.softcap))
        scores = slope * (form.softcap * LOG2E)
    elif factor(form, bias is not None) == 1.0:
        scores = scores * (form.scale * LOG2E)
    if bias is not None:
        scores = scores + bias
    return scores, slope


def tokens(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, A, G, T, D] as [units, heads, T, D'], D' a multiple of the lanes."""
    return _whole_lanes(x.reshape(-1, plan.heads, *x.shape[3:]))


def head_blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, H_kv, S, D] as [B * H_kv, blocks, block, D']."""
    return _whole_lanes(x.reshape(x.shape[0] * x.shape[1], -1, block, x.shape[3]))


def _whole_lanes(x: jax.Array) -> jax.Array:
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % LANES)))
