"""What a grid step of a TPU kernel of block-sparse attention is given, whichever side has lists.

See `_attention_tpu.py` for how a list is walked, `_attention_launch_tpu.py` for the operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _attention_tpu as shared
from pallas_kernels._attention_plan import Extras, Form, allowed
from pallas_kernels._attention_tpu import FAR, LOG2E, MASKED, META, Feed, Plan, Tile


class Part(NamedTuple):
    """A part of a tile: some heads against some members.

    Attributes:
        heads: Slice.
        rows: Slice of the rows of these heads.
        lanes: Slice of the lanes of these members.
        tile: Of these members.
        seen: [own, lanes], which pairs are allowed; None for all.
    """

    heads: slice
    rows: slice
    lanes: slice
    tile: Tile
    seen: jax.Array | None


class Step:
    """What a grid step is given beside the operands of its kernel.

    Attributes:
        form: Of the call.
        plan: Of the kernel.
        biased: Whether entries have a bias.
        rest: References of the kernel's own operands, results and scratch.
    """

    def __init__(self, form: Form, plan: Plan, extras: Extras, picks: list[str], refs: Any):
        """Take the references that `launch` orders."""
        self.form, self.plan, self.picks = form, plan, picks
        self.biased = extras.bias is not None
        self.core, self.step = pl.program_id(0), pl.program_id(1)
        self.line = plan.at(self.core, self.step)
        n, take = len(picks), iter(refs)
        self.here = next(take)
        self.following = None if plan.resident else next(take)
        self.bias = next(take) if self.biased else None
        segmented = extras.q_segments is not None
        self.segments = (next(take), next(take)) if segmented else None
        self.sources = [next(take) for _ in range(n)]
        *self.rest, self.parity, self.arrived = take
        self.rest, self.buffers = self.rest[:-n], self.rest[-n:]
        self.panel: Any = None

    def walk(self, work: Callable[..., None]) -> None:
        """Call work(parts, listed) for each tile; listed are the blocks it needs, by `blocks`."""
        if self.plan.resident:
            self.panel = self._panels()
            feed = None
        else:
            feed = Feed(
                self.here,
                self.following,
                self.core,
                self.step,
                self._copies,
                lambda at, size: [buffer.at[at, pl.ds(0, size)] for buffer in self.buffers],
                self.arrived,
                self.parity,
            )

        def tile(number: Any, size: int, masked: bool, at: Any) -> None:
            first = number * self.plan.members
            whole = Tile(self.here, first, size, self._width(), not masked)
            work(self._parts(whole, masked), self._blocks(whole, at))

        shared.walk(self.plan, self.here, tile, feed)

    def _width(self) -> int:
        """Lanes of a member."""
        return self.plan.listed * (self.plan.heads if self.plan.by_key else 1)

    def _source(self, array: Any, pick: str, line: Any, index: Any) -> Any:
        """A listed block; `pick` says how the array is laid out, see `launch`."""
        unit = lax.div(line, self.plan.lists)
        if pick == "head":
            return array.at[lax.div(unit, self.plan.units_per_head), index]
        return array.at[unit, :, index] if pick == "heads" else array.at[unit, index]

    def _copies(self, line: Any, index: Any, to: Any, member: Any) -> list[tuple[Any, Any]]:
        return [
            (self._source(array, pick, line, index), buffer.at[to, member])
            for array, pick, buffer in zip(self.sources, self.picks, self.buffers, strict=True)
        ]

    def _panels(self) -> Any:
        """The buffer of the listed side of this head; that of the next one comes meanwhile."""
        plan, step = self.plan, self.step

        def head_at(step: Any) -> Any:
            return lax.div(plan.at(self.core, step), plan.lists * plan.units_per_head)

        head, last = head_at(step), head_at(plan.per_core - 1)

        def copies(head: Any) -> list[Any]:
            at = lax.rem(head, 2)
            return [
                pltpu.make_async_copy(array.at[head], buffer.at[at], self.arrived.at[at])
                for array, buffer in zip(self.sources, self.buffers, strict=True)
            ]

        @pl.when(step == 0)
        def _():
            for copy in copies(head):
                copy.start()

        @pl.when((step == 0) | (head_at(jnp.maximum(step - 1, 0)) != head))
        def _():
            for copy in copies(head):
                copy.wait()

            @pl.when(head < last)
            def _():
                for copy in copies(head + 1):
                    copy.start()

        return lax.rem(head, 2)

    def _blocks(self, tile: Tile, at: Any) -> list[jax.Array]:
        """Each listed array: [members * tokens, D], or the members one by one if not of tokens."""
        found = []
        for buffer in self.buffers:
            if self.plan.resident:
                block = lambda m, buffer=buffer: buffer[self.panel, shared.index_of(tile.entry(m))]  # noqa: E731
                found.append(shared.stacked([block(member) for member in range(tile.size)]))
            elif buffer.ndim == 4 and buffer.shape[2] == 2:
                found.append([buffer[at, member] for member in range(tile.size)])
            else:
                found.append(buffer[at, pl.ds(0, tile.size)].reshape(-1, buffer.shape[-1]))
        return found

    def _parts(self, tile: Tile, masked: bool) -> list[Part]:
        """A tile in two, so that the products of one hide the exponentials of the other."""
        plan, width, lanes = self.plan, tile.width, tile.size * tile.width
        everything = slice(0, plan.heads)
        if plan.by_key:
            return [
                Part(
                    everything, slice(0, plan.own), slice(0, lanes), tile, self._seen(tile, masked)
                )
            ]
        height = plan.heads * plan.own
        if plan.heads % 2 == 0 and height >= 256:
            half, seen = plan.heads // 2, self._seen(tile, masked)
            cuts = [slice(0, half), slice(half, plan.heads)]
            return [
                Part(
                    cut,
                    slice(cut.start * plan.own, cut.stop * plan.own),
                    slice(0, lanes),
                    tile,
                    seen,
                )
                for cut in cuts
            ]
        pieces = 2 if tile.size % 2 == 0 and lanes >= 2048 else 1
        found = []
        for piece in range(pieces):
            size = tile.size // pieces
            some = tile.some(piece * size, size)
            cut = slice(piece * size * width, (piece + 1) * size * width)
            found.append(Part(everything, slice(0, height), cut, some, self._seen(some, masked)))
        return found

    def _seen(self, tile: Tile, masked: bool) -> jax.Array | None:
        """[own, lanes]: which pairs of an own token and a listed one are allowed."""
        if not masked:
            return None
        plan, form = self.plan, self.form
        lane = lax.broadcasted_iota(jnp.int32, (1, tile.size * tile.width), 1)
        block = plan.listed
        inside = lane & (block - 1) if block & (block - 1) == 0 else lax.rem(lane, block)

        def start(member: int) -> Any:
            return jnp.where(tile.live(member), shared.index_of(tile.entry(member)) * block, FAR)

        listed = tile.lanes(start, jnp.int32) + inside
        kind = tile.lanes(lambda member: shared.kind_of(tile.entry(member)), jnp.int32)
        first = lax.rem(self.line, plan.lists) * plan.own
        own = first + lax.broadcasted_iota(jnp.int32, (plan.own, 1), 0)
        ids: list[Any] = [None, None]
        if self.segments is not None:
            own_ids, listed_ids = self.segments
            repeats = tile.width // block
            rows = [
                listed_ids[pl.ds(shared.index_of(tile.entry(member)), 1), :]
                for member in range(tile.size)
            ]
            rows = [row for row in rows for _ in range(repeats)]
            ids = [shared.column(own_ids[...])[:, :1], shared.side_by_side(rows)]
        offset = self.here[0, 0, 2]
        if plan.by_key:
            return allowed(form, kind, listed, own, offset, *ids[::-1])
        return allowed(form, kind, own, listed, offset, *ids)

    def logits(self, scores: jax.Array, part: Part) -> tuple[jax.Array, jax.Array | None]:
        """See `logits`; what is hidden is MASKED. Queries are rows, or lanes in `by_key`."""
        plan, tile = self.plan, part.tile
        heads = range(part.heads.start, part.heads.stop)
        bias = None
        if self.bias is not None:
            places = self.here.shape[-1] - META

            def scalar(head: int, member: int) -> Any:
                return self.bias[0, 0, head * places + tile.place(member)]  # pyright: ignore

            if plan.by_key:
                wide = Tile(tile.here, tile.first, tile.size * plan.heads, plan.listed)
                bias = wide.lanes(lambda at: scalar(at % plan.heads, at // plan.heads), jnp.float32)
            else:
                rows = [
                    tile.lanes(lambda m, head=head: scalar(head, m), jnp.float32) for head in heads
                ]
                bias = shared.stacked([jnp.broadcast_to(r, (plan.own, r.shape[1])) for r in rows])
            bias = bias * LOG2E
        scores, slope = shared.logits(self.form, scores, bias)
        if part.seen is not None:
            count = 1 if plan.by_key else len(heads)
            pieces = [scores[i * plan.own : (i + 1) * plan.own] for i in range(count)]
            scores = shared.stacked([jnp.where(part.seen, piece, MASKED) for piece in pieces])
        return scores, slope
