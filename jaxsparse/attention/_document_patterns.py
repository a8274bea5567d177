"""Patterns of packed documents and of prompts made of parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsparse.attention._rules import Chunks, QueriesFrom
from jaxsparse.attention._window_patterns import CAUSAL, Sizes
from pallas_kernels._block_mask import BlockMask
from pallas_kernels._token_rules import Prefix


def segment_ids(lengths: jax.Array, length: int) -> jax.Array:
    """The number of the document of each token, of documents packed one after the other.

    Args:
        lengths: Integers `[..., documents]`, tokens of each; may be traced and 0.
        length: T, static; what is left over at the end gets the number of documents.

    Returns:
        int32 `[..., T]`, ascending.

    Example:
        >>> from jaxsparse.attention import segment_ids
        >>> segment_ids(jnp.array([2, 3]), 7)
        Array([0, 0, 1, 1, 1, 2, 2], dtype=int32)

    Cost: T comparisons a document.
    """
    ends = jnp.cumsum(jnp.asarray(lengths), -1)
    return jnp.sum(jnp.arange(length)[:, None] >= ends[..., None, :], -1, dtype=jnp.int32)


def documents(
    segment_ids: jax.Array, block_size: Sizes, *, kv_segment_ids: jax.Array | None = None
) -> BlockMask:
    """Blocks that may share a document, so that packed documents do not see each other.

    The mask is about blocks: where a document does not end with a block, also give the same ids to
    `block_sparse_attention(..., segment_ids=...)`, which hides the other documents token by token.

    Args:
        segment_ids: Integers `[B, T]`, or `[T]` for all; may be traced. Ascending ids give as few
            blocks as can be; others are correct, but may list blocks without a common document.
        block_size: (bq, bkv), tokens.
        kv_segment_ids: `[B, S]` or `[S]`, of the keys; those of the queries if not given.

    Raises:
        ValueError: If ids are not of one or two axes.

    Example:
        >>> from jaxsparse.attention import documents, draw, segment_ids
        >>> ids = segment_ids(jnp.array([4, 6, 2]), 12)
        >>> print(draw(documents(ids, (2, 2))))
        ##....
        ##....
        ..###.
        ..###.
        ..###.
        .....#

    Cost: the sum of squares of the lengths. Combine with `causal` or `sliding_window`, or ask
    `block_sparse_attention` for `causal=True`.
    """
    q, k = _ranges(segment_ids, kv_segment_ids, block_size)
    return _of_map((q[0] <= k[1]) & (k[0] <= q[1]), segment_ids, kv_segment_ids, block_size)


def anchor_window(
    segment_ids: jax.Array,
    block_size: Sizes,
    *,
    window: int = 1,
    anchors: int = 1,
    kv_segment_ids: jax.Array | None = None,
) -> BlockMask:
    """Each group of demonstrations sees itself, a few groups before it, and the first ones.

    Group g sees groups g - window to g, and those below `anchors`. Whole blocks, causal between
    groups; add `causal` for causality between tokens.

    Args:
        segment_ids: Integers `[B, T]`, or `[T]` for all: ascending numbers of groups, from 0; may
            be traced. Groups should end with a block: one that does not shares what its
            neighbour in the block sees.
        block_size: (bq, bkv), tokens.
        window: Groups before the own one.
        anchors: Groups at the beginning that every later group sees.
        kv_segment_ids: `[B, S]` or `[S]`, of the keys; those of the queries if not given.

    Raises:
        ValueError: If ids are not of one or two axes, or a number is negative.

    Example:
        >>> from jaxsparse.attention import anchor_window, draw, segment_ids
        >>> ids = segment_ids(jnp.array([2, 4, 2, 4]), 12)
        >>> print(draw(anchor_window(ids, (2, 2), window=1)))
        #.....
        ###...
        ###...
        ####..
        #..###
        #..###

    Cost: (window + anchors + 1) groups a group.

    Deviations: the paper caches the keys of groups and retrieves some of them at test time; that is
    not part of this. Itself, a fixed number before it and one anchor: checked in reviews of the
    paper; how many before it is yours to say.

    References: Xiao et al., Efficient Many-Shot In-Context Learning with Dynamic Block-Sparse
    Attention, 2025, arXiv:2503.08640.
    """
    if min(window, anchors) < 0:
        raise ValueError(f"window and anchors must not be negative; got {window} and {anchors}.")
    q, k = _ranges(segment_ids, kv_segment_ids, block_size)
    seen = (q[0] - k[1] <= window) | (k[0] < anchors)
    return _of_map(seen & (k[0] <= q[1]), segment_ids, kv_segment_ids, block_size)


def block_rank(
    shape: Sizes,
    block_size: Sizes,
    *,
    instruction: int,
    document: int,
    count: int,
    causal: bool = True,
) -> BlockMask:
    """BlockRank: documents see themselves and the instruction; the query behind them sees all.

    The prompt is the instruction, `count` documents of one length, and the query.

    Args:
        shape: (T, S) with T = S.
        block_size: (bq, bkv), tokens.
        instruction: Tokens of the instruction.
        document: Tokens of each document, padded.
        count: Documents.
        causal: Whether a key that comes after a query stays hidden from it.

    Raises:
        ValueError: If T is not S, or the parts do not fit in T.

    Example:
        >>> from jaxsparse.attention import block_rank, draw
        >>> print(draw(block_rank((18, 18), (2, 2), instruction=2, document=4, count=3)))
        +........
        #+.......
        ##+......
        #..+.....
        #..#+....
        #....+...
        #....#+..
        #######+.
        ########+

    Cost: linear in the number of documents. `return_block_mass` of `block_sparse_attention` gives
    the attention of the query to each document, by which the paper ranks.

    Deviations: exact to the token. Who sees whom was checked against the caption of figure 2. The
    contrastive loss on that attention is not part of this.

    References: Gupta et al., Scalable In-context Ranking with Generative Models, 2025,
    arXiv:2510.05396.
    """
    query = instruction + document * count
    if shape[0] != shape[1] or min(document, count) < 1 or not 0 <= instruction <= query < shape[0]:
        raise ValueError(
            f"{instruction} + {count} x {document} tokens and a query must fit in T = S; got "
            f"shape={shape}."
        )
    rule = Chunks(document, start=instruction, count=count) | QueriesFrom(query)
    rule = rule | Prefix(instruction) if instruction else rule
    return BlockMask.from_rule(rule & CAUSAL if causal else rule, shape, block_size)


def _ranges(
    segment_ids: jax.Array, kv_segment_ids: jax.Array | None, block_size: Sizes
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(lowest, highest) id of each block of queries [B, 1, R, 1] and of keys [B, 1, 1, C]."""
    both = segment_ids, segment_ids if kv_segment_ids is None else kv_segment_ids
    found = []
    for ids, block, axis in zip(both, block_size, (2, 3), strict=True):
        ids = jnp.asarray(ids)
        if ids.ndim not in (1, 2):
            raise ValueError(f"segment ids must be [B, T] or [T]; got {ids.shape}.")
        ids = jnp.atleast_2d(ids)
        ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")
        ids = ids.reshape(ids.shape[0], -1, block)
        other = 5 - axis
        found.append(tuple(jnp.expand_dims(x, (1, other)) for x in (ids.min(2), ids.max(2))))
    return found[0], found[1]


def _of_map(
    seen: jax.Array,
    segment_ids: jax.Array,
    kv_segment_ids: jax.Array | None,
    block_size: Sizes,
) -> BlockMask:
    keys = segment_ids if kv_segment_ids is None else kv_segment_ids
    shape = jnp.shape(segment_ids)[-1], jnp.shape(keys)[-1]
    return BlockMask.from_dense(seen, block_size, shape=shape)
