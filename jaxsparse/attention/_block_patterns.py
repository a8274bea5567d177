"""Patterns over whole blocks: shards for every head, powers of two, butterflies, random blocks.

i is the block of a query, j that of a key, both counted in blocks of keys (bkv tokens), so that
blocks of queries may have another size: such a block sees what any of its tokens sees.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse.attention._select import largest
from jaxsparse.attention._window_patterns import CAUSAL, Sizes
from pallas_kernels._block_mask import BlockMask
from pallas_kernels._token_rules import Shifted


def block_pattern(
    sees: Callable[[jax.Array, jax.Array], jax.Array],
    shape: Sizes,
    block_size: Sizes,
    *,
    causal: bool = False,
    q_offset: int = 0,
) -> BlockMask:
    """The mask of any function of block numbers: the way to write a pattern of your own.

    Args:
        sees: (i, j) -> bool `[R, C]`, or `[heads, R, C]`, for int32 i `[R, 1]` and j `[1, C]`.
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        causal: Whether to hide, token by token, keys that come after a query.
        q_offset: Position of the first query.

    Raises:
        ValueError: If sizes do not fit.

    Example:
        >>> from jaxsparse.attention import block_pattern, draw
        >>> print(draw(block_pattern(lambda i, j: (i + j) % 3 == 0, (8, 8), (2, 2), causal=True)))
        +...
        ....
        .#..
        #..+

    Cost: ceil(bq / bkv) + 1 calls, on arrays of one entry a block.
    """
    (t, s), (bq, bkv) = shape, block_size
    if min(t, s, bq, bkv) < 1:
        raise ValueError(f"shape and block_size must be positive; got {shape} and {block_size}.")
    begin = jnp.arange(0, t, bq, dtype=jnp.int32)
    first = (begin + q_offset) // bkv
    last = (jnp.minimum(begin + bq, t) - 1 + q_offset) // bkv
    j = jnp.arange(-(-s // bkv), dtype=jnp.int32)[None]
    most = -(-bq // bkv) if bq % bkv == 0 and q_offset % bkv == 0 else -(-(bq - 1) // bkv) + 1
    seen = sees(first[:, None], j)
    for step in range(1, most):
        seen = seen | sees(jnp.minimum(first + step, last)[:, None], j)
    seen = jnp.broadcast_to(seen, (*seen.shape[:-2], begin.size, j.size))
    rule = (Shifted(CAUSAL, q_offset) if q_offset else CAUSAL) if causal else None
    seen = seen.reshape(1, -1, *seen.shape[-2:])
    return BlockMask.from_dense(seen, block_size, shape=shape, rule=rule)


def s2(
    shape: Sizes, block_size: Sizes, *, heads: int, stride: int, local: int, q_offset: int = 0
) -> BlockMask:
    """S2-Attention: a local window, and another shard of the context for every head.

    Head h sees block j of block i >= j if i - j < local or (j + o_h) mod stride = 0, with o_h =
    1 + h max(1, stride // heads). At inference a head needs the keys of its shard and window only.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        heads: A, of the mask; take H_kv for grouped queries, so that a group shares its shard.
        stride: Blocks from one block of a shard to the next.
        local: Blocks of the window, the query's own among them.
        q_offset: Position of the first query.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> from jaxsparse.attention import draw, s2
        >>> print(draw(s2((10, 10), (2, 2), heads=2, stride=2, local=1)))
        +....  +....
        .+...  #+...
        .#+..  #.+..
        .#.+.  #.#+.
        .#.#+  #.#.+

    Cost: T (local bkv + S / (2 stride)) pairs a head. With heads >= stride the shards of all heads
    are the whole context; with fewer heads they are heads / stride of it.

    Deviations: none known; the rule and the offsets were checked against the kernel's masks in
    vLLM. That the union is the whole context holds as said under Cost, and is tested.

    References: Lin et al., S2-Attention: Hardware-Aware Context Sharding Among Attention Heads,
    2024, arXiv:2407.17678.
    """
    _at_least(1, heads=heads, stride=stride, local=local)
    offset = 1 + max(1, stride // heads) * jnp.arange(heads, dtype=jnp.int32)[:, None, None]

    def sees(i: jax.Array, j: jax.Array) -> jax.Array:
        return (j <= i) & ((i - j < local) | ((j + offset) % stride == 0))

    return block_pattern(sees, shape, block_size, causal=True, q_offset=q_offset)


def power_attention(
    shape: Sizes, block_size: Sizes, *, local: int = 1, sinks: int = 1, q_offset: int = 0
) -> BlockMask:
    """PowerAttention: blocks at distances 1, 2, 4, 8, ..., a local window and sinks; causal.

    After d layers a query depends on every block nearer than 2^d: a distance is a sum of at most d
    powers of two.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        local: Blocks of the window, the query's own among them.
        sinks: Blocks at the beginning that everybody sees; 0 for none.
        q_offset: Position of the first query.

    Raises:
        ValueError: If `local` is below 1 or `sinks` below 0.

    Example:
        >>> from jaxsparse.attention import draw, power_attention
        >>> print(draw(power_attention((14, 14), (2, 2), sinks=0)))
        +......
        #+.....
        ##+....
        .##+...
        #.##+..
        .#.##+.
        ..#.##+

    Cost: O(T log T) pairs: log2(S / bkv) + local + sinks blocks a block of queries.

    Deviations: distances count blocks, as in the paper's kernels; its theory (section 3.3, checked)
    counts tokens. The reach of 2^d is tested.

    References: Chen et al., PowerAttention: Exponentially Scaling of Receptive Fields for Effective
    Sparse Attention, 2025, arXiv:2503.03588.
    """
    _at_least(1, local=local)
    _at_least(0, sinks=sinks)

    def sees(i: jax.Array, j: jax.Array) -> jax.Array:
        distance = i - j
        power = (distance > 0) & (distance & (distance - 1) == 0)
        return (distance >= 0) & (power | (distance < local) | (j < sinks))

    return block_pattern(sees, shape, block_size, causal=True, q_offset=q_offset)


def pixelfly(
    shape: Sizes, block_size: Sizes, *, stride: int | None = None, edges: int = 1
) -> BlockMask:
    """Pixelated butterfly: blocks i xor j = 0 or a power of two, and a cross of low rank.

    The flat block butterfly: all factors of a butterfly matrix added up instead of multiplied. The
    low-rank part of the paper is, in attention, a few blocks that see and are seen by all.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        stride: The largest power of two that counts, in blocks; all of them if not given.
        edges: Blocks at the beginning that see and are seen by all; 0 for none.

    Raises:
        ValueError: If a size is too small.

    Example:
        >>> from jaxsparse.attention import draw, pixelfly
        >>> print(draw(pixelfly((16, 16), (2, 2), edges=0)))
        ###.#...
        ##.#.#..
        #.##..#.
        .###...#
        #...###.
        .#..##.#
        ..#.#.##
        ...#.###

    Cost: O(T log T) pairs. All of it is seen after log2(blocks) layers.

    Deviations: not causal; `& causal(...)` makes it so. Block counts that are no power of two use
    the first rows and columns of the next one. Block (i, j) of the butterfly is our reading, tested
    by what a product of butterfly factors reaches. The mix of the two parts by a learned weight
    belongs to the layer.

    References: Dao et al., Pixelated Butterfly: Simple and Efficient Sparse Training for Neural
    Network Models, 2021, arXiv:2112.00029.
    """
    _at_least(0, edges=edges, stride=0 if stride is None else stride)

    def sees(i: jax.Array, j: jax.Array) -> jax.Array:
        bit = i ^ j
        butterfly = bit & (bit - 1) == 0  # 0 and the powers of two
        if stride is not None:
            butterfly &= bit <= stride
        return butterfly | (i < edges) | (j < edges)

    return block_pattern(sees, shape, block_size)


def random_blocks(
    shape: Sizes,
    block_size: Sizes,
    *,
    count: int,
    key: jax.Array,
    heads: int = 1,
    exclude: BlockMask | None = None,
) -> BlockMask:
    """Each block of queries of each head sees `count` blocks of keys drawn at random.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        count: Blocks, drawn without replacement; fewer where fewer are left.
        key: PRNG key.
        heads: A, of the mask.
        exclude: Blocks that are not drawn: those it lists. `~causal(...)` draws from the past and
            the present alone; its diagonal blocks are listed, so not drawn.

    Raises:
        ValueError: If `count` or `heads` is below 1, or `exclude` has other sizes.

    Example:
        >>> import jax
        >>> from jaxsparse.attention import random_blocks
        >>> mask = random_blocks((64, 64), (8, 8), count=3, key=jax.random.key(0), heads=2)
        >>> mask.by_query.count[0].tolist() == [[3] * 8] * 2
        True

    Cost: T count bkv pairs a head; one random number for each block.

    References: Zaheer et al., Big Bird: Transformers for Longer Sequences, 2020, arXiv:2007.14062.
    """
    _at_least(1, count=count, heads=heads)
    (t, s), (bq, bkv) = shape, block_size
    scores = jax.random.uniform(key, (1, heads, -(-t // bq), -(-s // bkv)))
    if exclude is not None:
        if (exclude.shape, exclude.block_size) != (shape, block_size):
            raise ValueError(
                f"exclude must be a mask of {shape} in {block_size}; got {exclude.shape} in "
                f"{exclude.block_size}."
            )
        scores = jnp.where(exclude.block_map, jnp.nan, scores)  # NaN is never chosen
    return BlockMask.from_dense(largest(scores, count), block_size, shape=shape)


def bigbird(
    shape: Sizes,
    block_size: Sizes,
    *,
    key: jax.Array,
    window: int = 3,
    random: int = 3,
    edges: int = 1,
    heads: int = 1,
) -> BlockMask:
    """BigBird: a window, global blocks at both ends, and random blocks.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens; 64 in the paper.
        key: PRNG key of the random blocks.
        window: Blocks around the query's own, which is in the middle; odd.
        random: Blocks a block of queries sees besides, drawn for every head; 0 for none.
        edges: Global blocks at each end: they see everything, and everything sees them.
        heads: A, of the mask; 1 draws once for all heads.

    Raises:
        ValueError: If `window` is even, or a size is too small.

    Example:
        >>> import jax
        >>> from jaxsparse.attention import bigbird, draw
        >>> print(draw(bigbird((14, 14), (2, 2), key=jax.random.key(0), random=0)))
        #######
        ###...#
        ####..#
        #.###.#
        #..####
        #...###
        #######

    Cost: (window + random + 2 edges) blocks a block of queries: linear in T. Two layers connect
    every pair, through the global blocks.

    Deviations: the internal construction (ITC) of the paper, on existing tokens, and not causal;
    `& causal(...)` makes it so. Random blocks are drawn outside of window and global blocks; global
    ones need none. Three random blocks are what released configurations have; a window of three
    and one global block at each end are our reading.

    References: Zaheer et al., Big Bird: Transformers for Longer Sequences, 2020, arXiv:2007.14062.
    """
    if window % 2 == 0 or window < 1:
        raise ValueError(f"window must be odd, blocks around the query's own; got {window}.")
    _at_least(0, random=random, edges=edges)
    last = -(-shape[1] // block_size[1]) - edges

    def sees(i: jax.Array, j: jax.Array) -> jax.Array:
        ends = (i < edges) | (i >= last) | (j < edges) | (j >= last)
        return ends | (abs(i - j) <= window // 2)

    mask = block_pattern(sees, shape, block_size)
    if not random:
        return mask
    options = {"count": random, "key": key, "heads": heads, "exclude": mask}
    return mask | random_blocks(shape, block_size, **options)


def _at_least(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} must be at least {least}; got {size}.")
