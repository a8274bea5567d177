"""What a kernel of block-sparse attention is told beside its arrays, and the lists it walks.

Shape letters: B batch, A units (a list of key blocks with one key-value head), G query heads of a
unit, H_kv key-value heads, R query blocks, C key blocks, W places of a list, T and S padded to
whole blocks, D head width. Unit a uses key-value head a H_kv // A and the lists of mask head
a A' // A.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._block_lists import BlockLists, sorted_lists
from pallas_kernels._block_mask import BlockMask
from pallas_kernels._token_rules import Rule


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static.

    Attributes:
        block_size: (bq, bkv).
        shape: (T, S), before padding.
        rules: By kind; see `BlockMask`.
        causal: Whether key s is hidden from query t where s > t + offset.
        scale: Of the scores.
        softcap: c of c tanh(score / c), or None.
    """

    block_size: tuple[int, int]
    shape: tuple[int, int]
    rules: tuple[Rule, ...]
    causal: bool
    scale: float
    softcap: float | None = None


class Extras(NamedTuple):
    """Arrays beside q, k, v and the lists; leading axes are B or 1.

    Attributes:
        offset: int32 `[B]`: query t stands at position t + offset; 0 if not causal.
        q_segments: int32 `[B, T]`, or None: a query sees keys of its own segment.
        k_segments: int32 `[B, S]`, or None.
        bias: float32 `[B, A, G, R, W]`, or None: added to the scores of the entries by query.
        key_bias: float32 `[B, A, G, C, W']`: the same for the entries by key.
    """

    offset: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    bias: jax.Array | None = None
    key_bias: jax.Array | None = None


def allowed(
    form: Form,
    kind: jax.Array,
    q: jax.Array,
    k: jax.Array,
    offset: jax.Array,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
) -> jax.Array:
    """Which pairs of tokens a partial block of this kind allows, for positions that broadcast.

    Elementwise; kernels call it as well.
    """
    seen = k < form.shape[1]
    for number, rule in enumerate(form.rules, 1):
        seen &= (kind != number) | rule(q, k)
    if form.causal:
        seen &= k <= q + offset
    if q_segments is not None:
        seen &= q_segments == k_segments
    return seen


def refined(mask: BlockMask, form: Form, extras: Extras) -> tuple[BlockLists, BlockLists]:
    """The lists of a mask, sorted again by what causality, segments and the ragged end leave.

    Cost: two sorts of the lists; nothing if there is nothing to leave out.
    """
    ragged = form.shape[1] % form.block_size[1] != 0
    if not (form.causal or ragged or extras.q_segments is not None):
        return mask.by_query, mask.by_key
    kinds = len(form.rules) + 1

    def refine(lists: BlockLists, transposed: bool) -> BlockLists:
        own = jnp.arange(lists.index.shape[2], dtype=jnp.int32)[:, None]
        r, c = (lists.index, own) if transposed else (own, lists.index)
        some, every = _states(form, extras, r, c)
        place = jnp.arange(lists.index.shape[3], dtype=jnp.int32)
        live = (place < lists.count[..., None]) & some
        kind = jnp.where(live, lists.kind, -1)
        partial_ = (place >= lists.full[..., None]) | ~every
        index = jnp.broadcast_to(lists.index, kind.shape)
        return sorted_lists(index, kind, partial_, mask.grid[0 if transposed else 1], kinds)

    return refine(mask.by_query, False), refine(mask.by_key, True)


def _states(form: Form, extras: Extras, r: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(some, every) of blocks (r, c) by causality, segments and the end of the keys."""
    (bq, bkv), (_, s) = form.block_size, form.shape
    some = every = jnp.ones((1,) * 4, bool)
    if s % bkv:
        every &= (c + 1) * bkv <= s
    if form.causal:
        first = r * bq + extras.offset[:, None, None, None]
        some &= c * bkv <= first + bq - 1
        every &= (c + 1) * bkv - 1 <= first
    if extras.q_segments is not None and extras.k_segments is not None:
        q_low, q_high = _range(extras.q_segments, bq, r)
        k_low, k_high = _range(extras.k_segments, bkv, c)
        some &= (q_low <= k_high) & (k_low <= q_high)
        every &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return some, every


def _range(segments: jax.Array, block: int, which: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest segment of the blocks `which` (any leading axes), as [B, A, R, W]."""
    blocks = segments.reshape(segments.shape[0], -1, block)
    which = which.reshape((1,) * (4 - which.ndim) + which.shape)
    batch = max(which.shape[0], blocks.shape[0])
    which = jnp.broadcast_to(which, (batch, *which.shape[1:]))

    def pick(values: jax.Array) -> jax.Array:
        values = jnp.broadcast_to(values, (batch, values.shape[1]))
        return jax.vmap(lambda line, index: line[index])(values, which)

    return pick(blocks.min(2)), pick(blocks.max(2))


def _spread(lists: BlockLists, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Index and live of lists as [B, A, 1, R, W] for a shape [B, A, ...]."""
    live = jnp.arange(lists.index.shape[3]) < lists.count[..., None]
    wide = []
    for x in (lists.index, live):
        x = jnp.repeat(x, shape[1] // x.shape[1], 1)
        wide.append(jnp.broadcast_to(x, (shape[0], *x.shape[1:]))[:, :, None])
    return wide[0], wide[1]


def of_entries(block_map: jax.Array, lists: BlockLists) -> jax.Array:
    """Values [B, A, G, R, C] of a map at the entries of lists: [B, A, G, R, W], else 0."""
    index, live = _spread(lists, block_map.shape)
    index = jnp.broadcast_to(index, (*block_map.shape[:4], index.shape[-1]))
    return jnp.where(live, jnp.take_along_axis(block_map, index, -1), 0)


def to_map(entries: jax.Array, lists: BlockLists, blocks: int) -> jax.Array:
    """The map [B, A, G, R, blocks] of values of entries; zero where there is none."""
    index, live = _spread(lists, entries.shape)
    index = jnp.broadcast_to(jnp.where(live, index, blocks), entries.shape)

    def line(index: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.zeros(blocks, values.dtype).at[index].set(values, mode="drop")

    for _ in range(4):
        line = jax.vmap(line)
    return line(index, entries)
