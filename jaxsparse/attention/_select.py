"""Choosing blocks from scores: the common core of methods that look before they attend.

A score for each pair of blocks, here from pooled queries and keys, then the best blocks of each
block of queries: a fixed number (top-k) or as many as reach a share of the attention (top-p).
Everything runs on the device, on arrays of one entry a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.attention._window_patterns import CAUSAL, Sizes
from jaxsparse.select import keep_top
from pallas_kernels._block_mask import BlockMask
from pallas_kernels._token_rules import Shifted


def mean_pool(x: jax.Array, block: int) -> jax.Array:
    """The mean of the tokens of each block: `[B, T, H, D]` to float32 `[B, blocks, H, D]`.

    Example:
        >>> from jaxsparse.attention import mean_pool
        >>> mean_pool(jnp.arange(5.0).reshape(1, 5, 1, 1), 2).ravel()
        Array([0.5, 2.5, 4. ], dtype=float32)

    Cost: one pass over x.
    """
    blocks = _blocked(x, block, 0)
    count = jnp.minimum(block, x.shape[1] - block * jnp.arange(blocks.shape[1]))
    return jnp.sum(blocks, 2, dtype=jnp.float32) / count[:, None, None].astype(jnp.float32)


def max_pool(x: jax.Array, block: int) -> jax.Array:
    """The largest entry over the tokens of each block: `[B, T, H, D]` to `[B, blocks, H, D]`.

    Example:
        >>> from jaxsparse.attention import max_pool
        >>> max_pool(jnp.arange(5.0).reshape(1, 5, 1, 1), 2).ravel()
        Array([1., 3., 4.], dtype=float32)

    Cost: one pass over x.
    """
    return jnp.max(_blocked(x, block, -jnp.inf), 2).astype(jnp.float32)


def block_scores(
    q: jax.Array,
    k: jax.Array,
    block_size: Sizes,
    *,
    heads: int | None = None,
    pool: Callable[[jax.Array, int], jax.Array] = mean_pool,
    scale: float | None = None,
) -> jax.Array:
    """How well blocks of keys match blocks of queries: products of pooled queries and keys.

    Args:
        q: `[B, T, H, D]`.
        k: `[B, S, H_kv, D]`, H_kv divides H.
        block_size: (bq, bkv), tokens.
        heads: A: the mean over H / A neighbouring heads, which then share their blocks; H if not
            given. One of A and H_kv divides the other; take H_kv for one list a group.
        pool: (x, block) -> `[B, blocks, H, D]`: `mean_pool`, `max_pool` or your own.
        scale: Of the scores; D ** -0.5 if not given.

    Returns:
        float32 `[B, A, R, C]`, differentiable; the logarithm of the expected attention, but for a
        constant of each row, if tokens of a block are alike.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> from jaxsparse.attention import block_scores
        >>> q = k = jnp.ones((1, 6, 2, 4))
        >>> block_scores(q, k, (2, 2)).shape
        (1, 2, 3, 3)

    Cost: one pass over q and k, and 2 R C D FLOPs a head.

    References: Jiang et al., MInference 1.0, 2024, arXiv:2407.02490; Zhang et al., SpargeAttn,
    2025, arXiv:2502.18137.
    """
    h, d = q.shape[2:]
    h_kv = k.shape[2]
    heads = h if heads is None else heads
    if h % h_kv or h % heads or (heads % h_kv and h_kv % heads) or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"heads={heads} and the heads of k must divide those of q, one of the two the other, "
            f"and q and k agree in batch and width; got {q.shape} and {k.shape}."
        )
    units = max(heads, h_kv)
    q_, k_ = pool(q, block_size[0]), pool(k, block_size[1])
    q_ = q_.reshape(*q_.shape[:2], units, h // units, d).mean(3)
    k_ = jnp.repeat(k_, units // h_kv, 2)
    scores = jnp.einsum("brhd,bchd->bhrc", q_, k_, preferred_element_type=jnp.float32)
    scores = scores.reshape(scores.shape[0], heads, -1, *scores.shape[2:]).mean(2)
    return scores * (d**-0.5 if scale is None else scale)


def top_k_blocks(
    scores: jax.Array,
    shape: Sizes,
    block_size: Sizes,
    *,
    count: int | jax.Array,
    causal: bool = False,
    q_offset: int = 0,
    sinks: int = 1,
    local: int = 1,
    within: BlockMask | None = None,
) -> BlockMask:
    """The `count` blocks of highest score of each block of queries; exact ties by index.

    Args:
        scores: `[B or 1, A, R, C]`, any real dtype, as from `block_scores`. NaN is never chosen.
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        count: Blocks listed, forced ones among them; fewer where fewer are visible. An int, or
            integers that broadcast to `[B, A, R]`, which may be traced.
        causal: Whether keys that come after a query are hidden: blocks by choice, tokens by rule.
        q_offset: Position of the first query.
        sinks: Blocks at the beginning that are always listed.
        local: Blocks up to the query's own that are always listed; if not causal as many after it.
            0 forces none.
        within: The result is a part of this mask: only blocks that it lists are chosen.

    Returns:
        A mask of A heads; lists have `count` places, or C if `count` is an array.

    Raises:
        ValueError: If shapes do not fit, or `count` has no room for the forced blocks.

    Example:
        >>> from jaxsparse.attention import draw, top_k_blocks
        >>> scores = jnp.array([[[[9, 0, 0, 0], [0, 9, 0, 0], [0, 9, 0, 0], [1, 0, 2, 0]]]])
        >>> print(draw(top_k_blocks(scores, (8, 8), (2, 2), count=2, causal=True, sinks=0)))
        +...
        #+..
        .#+.
        ..#+

    Cost: about 32 passes over the scores (`jaxsparse.select`), and two sorts of lists of C.

    Deviations: papers differ in what they force; MInference takes the diagonal, NSA one sink and
    two local blocks within its sixteen.

    References: Jiang et al., MInference 1.0, 2024, arXiv:2407.02490; Yuan et al., Native Sparse
    Attention, 2025, arXiv:2502.11089.
    """
    frame = _Frame(scores, shape, block_size, causal, q_offset, sinks, local, within)
    if isinstance(count, int):
        frame.check_room(count, "count")
        return frame.mask(count, count)
    return frame.mask(jnp.asarray(count)[..., None], None)


def top_p_blocks(
    scores: jax.Array,
    shape: Sizes,
    block_size: Sizes,
    *,
    mass: float | jax.Array,
    capacity: int | None = None,
    least: int = 1,
    causal: bool = False,
    q_offset: int = 0,
    sinks: int = 1,
    local: int = 1,
    within: BlockMask | None = None,
) -> BlockMask:
    """The fewest blocks, forced ones among them, whose softmax of scores reaches `mass`.

    Args:
        scores: As for `top_k_blocks`; softmax is taken over the visible blocks of a row.
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        mass: 0 to 1, of each row; a number, or an array that broadcasts to `[B, A, R]`.
        capacity: The most blocks in a list; C if not given. A row that needs more gets the forced
            blocks and the heaviest others, and its mass falls short.
        least: The fewest blocks, if so many are visible.
        causal: As for `top_k_blocks`; so are `q_offset`, `sinks`, `local` and `within`.
        q_offset: Position of the first query.
        sinks: Blocks at the beginning that are always listed.
        local: Blocks up to the query's own that are always listed.
        within: The result is a part of this mask.

    Returns:
        A mask of A heads.

    Raises:
        ValueError: If shapes do not fit, or `capacity` has no room for the forced blocks.

    Example:
        >>> from jaxsparse.attention import draw, top_p_blocks
        >>> scores = jnp.log(jnp.array([[[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]]]))
        >>> print(draw(top_p_blocks(scores, (6, 6), (2, 2), mass=0.75, sinks=0, local=0)))
        ##.
        .#.
        ###

    Cost: that of `top_k_blocks` and 31 more passes over the scores.

    Deviations: the mass counts in each row. SpargeAttn and block-sparse VGGT do so too; FlexPrefill
    counts over all rows of a head together. SpargeAttn's blocks of unlike tokens, FlexPrefill's
    vertical-slash heads and VGGT's special tokens are not part of this: join them with `|`.

    References: Lai et al., FlexPrefill, 2025, arXiv:2502.20766; Zhang et al., SpargeAttn, 2025,
    arXiv:2502.18137; Wang et al., Faster VGGT with Block-Sparse Global Attention, 2025,
    arXiv:2509.07120.
    """
    frame = _Frame(scores, shape, block_size, causal, q_offset, sinks, local, within)
    capacity = frame.blocks if capacity is None else capacity
    frame.check_room(capacity, "capacity")
    wanted = jnp.asarray(mass, jnp.float32)[..., None]
    count = _reaching(frame.scores.astype(jnp.float32), frame.visible, frame.forced, wanted)
    count = jnp.maximum(count, least)
    return frame.mask(jnp.minimum(count, capacity), capacity)


@jax.jit
def largest(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """The `count` largest scores of each row, a mask; ties by index, NaN never."""
    return keep_top(scores, count, (-1,))


@jax.jit
def _reaching(
    scores: jax.Array, visible: jax.Array, forced: jax.Array, wanted: jax.Array
) -> jax.Array:
    """How many blocks of each row [..., 1] reach the mass: the forced ones, then the heaviest.

    Without a sort: the lightest share that is needed is found bit by bit, the bits of shares, which
    are not negative, being in the order of the shares.
    """
    share = jnp.where(visible, jax.nn.softmax(scores, -1, where=visible), 0)

    def total(of: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(of, share, 0), -1, keepdims=True)

    def number(of: jax.Array) -> jax.Array:
        return jnp.sum(of, -1, keepdims=True, dtype=jnp.int32)

    need = wanted - total(forced)
    bits = jax.lax.bitcast_convert_type(share, jnp.int32)
    bits = jnp.where(visible & ~forced, bits, -1)

    def decide(i: jax.Array, lightest: jax.Array) -> jax.Array:
        candidate = lightest | (jnp.int32(1) << (30 - i))
        return jnp.where(total(bits >= candidate) >= need, candidate, lightest)

    start = jnp.zeros(jnp.broadcast_shapes(need.shape, (*share.shape[:-1], 1)), jnp.int32)
    lightest = jax.lax.fori_loop(0, 31, decide, start)
    heavier, ties = bits > lightest, bits == lightest
    each = jax.lax.bitcast_convert_type(lightest, jnp.float32)
    some = jnp.ceil((need - total(heavier)) / jnp.where(each > 0, each, 1))
    some = jnp.where(each > 0, jnp.clip(some, 1, number(ties)), number(ties)).astype(jnp.int32)
    return number(forced) + jnp.where(need > 0, number(heavier) + some, 0)


def _blocked(x: jax.Array, block: int, fill: float) -> jax.Array:
    """[B, T, H, D] as [B, blocks, block, H, D], the end filled."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)), constant_values=fill)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


class _Frame:
    """What may be chosen and what must be: `visible` and `forced`, over `[B, A, R, C]`."""

    def __init__(
        self,
        scores: jax.Array,
        shape: Sizes,
        block_size: Sizes,
        causal: bool,
        q_offset: int,
        sinks: int,
        local: int,
        within: BlockMask | None,
    ) -> None:
        (t, s), (bq, bkv) = shape, block_size
        rows, self.blocks = -(-t // bq), -(-s // bkv)
        scores = jax.lax.stop_gradient(jnp.asarray(scores))
        if scores.ndim != 4 or scores.shape[2:] != (rows, self.blocks):
            raise ValueError(
                f"scores must be [B or 1, heads, {rows}, {self.blocks}] for {shape} tokens in "
                f"blocks of {block_size}; got {scores.shape}."
            )
        if min(sinks, local) < 0:
            raise ValueError(f"sinks and local must not be negative; got {sinks} and {local}.")
        if within is not None:
            if (within.shape, within.block_size) != (shape, block_size):
                raise ValueError(
                    f"within must be a mask of {shape} in {block_size}; got {within.shape} in "
                    f"{within.block_size}."
                )
            if scores.shape[1] % within.heads or scores.shape[0] < within.by_query.index.shape[0]:
                raise ValueError(
                    f"the heads of within must divide those of the scores {scores.shape}, and its "
                    f"batch not be larger; got {within.by_query.index.shape[:2]}."
                )
        self.scores, self.within, self.block_size, self.shape = scores, within, block_size, shape
        begin = jnp.arange(0, t, bq)[:, None]
        first, last = begin + q_offset, jnp.minimum(begin + bq, t) - 1 + q_offset
        j = jnp.arange(self.blocks)
        visible = scores == scores
        if causal:
            visible &= j * bkv <= last
        if within is not None:
            visible &= jnp.repeat(within.block_map, scores.shape[1] // within.heads, 1)
        after = 0 if causal else max(local - 1, 0)
        near = (j > first // bkv - local) & (j <= last // bkv + after)
        self.visible, self.forced = visible, visible & ((j < sinks) | near & (local > 0))
        own = -(-bq // bkv) if bq % bkv == 0 and q_offset % bkv == 0 else -(-(bq - 1) // bkv) + 1
        self.most_forced = sinks + (local + own - 1 + after if local else 0)
        self.rule = (Shifted(CAUSAL, q_offset) if q_offset else CAUSAL) if causal else None

    def check_room(self, count: int, name: str) -> None:
        """Raise ValueError if `count` places cannot hold the forced blocks."""
        if count < min(max(self.most_forced, 1), self.blocks):
            raise ValueError(
                f"{name}={count} has no room for {self.most_forced} forced blocks (sinks and "
                "local); raise it, or force fewer."
            )

    def mask(self, count: Any, capacity: int | None) -> BlockMask:
        """The mask of the forced blocks, then those of highest score, `count` [..., 1] in all."""
        scores = self.scores
        if not jnp.issubdtype(scores.dtype, jnp.floating):
            scores = scores.astype(jnp.float32)
        ranked = jnp.where(self.forced, jnp.inf, jnp.where(self.visible, scores, jnp.nan))
        kept = largest(ranked, count)
        shape, block_size = self.shape, self.block_size
        mask = BlockMask.from_dense(
            kept, block_size, shape=shape, rule=self.rule, capacity=capacity
        )
        return mask if self.within is None else mask & self.within
