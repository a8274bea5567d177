"""Patterns that are exact to the token: windows, sinks, strides, and a window for every head.

Every function returns a `BlockMask` for shape=(T, S) tokens; masks of one shape and block size
combine with `&`, `|` and `~`. `q_offset` is the position of the first query, keys begin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxsparse.attention._rules import Chunks, Columns, Stride
from pallas_kernels._block_mask import BlockMask
from pallas_kernels._token_rules import Prefix, Rule, Window

CAUSAL = Window(None, 0)
Sizes = tuple[int, int]


def causal(shape: Sizes, block_size: Sizes, *, q_offset: int = 0) -> BlockMask:
    """Each query sees the keys that are not after it.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        q_offset: Position of the first query.

    Example:
        >>> from jaxsparse.attention import causal, draw
        >>> print(draw(causal((8, 8), (2, 2))))
        +...
        #+..
        ##+.
        ###+

    Cost: half of all blocks; the diagonal ones are partial.
    """
    return BlockMask.from_rule(CAUSAL, shape, block_size, q_offset=q_offset)


def sliding_window(
    shape: Sizes, block_size: Sizes, *, left: int, right: int = 0, q_offset: int = 0
) -> BlockMask:
    """Each query sees itself, `left` keys before it and `right` keys after it.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        left: Tokens; a window of w tokens that ends with the query is left=w - 1.
        right: Tokens; 0 is causal.
        q_offset: Position of the first query.

    Raises:
        ValueError: If a side is negative.

    Example:
        >>> from jaxsparse.attention import draw, sliding_window
        >>> print(draw(sliding_window((10, 10), (2, 2), left=3)))
        +....
        #+...
        +#+..
        .+#+.
        ..+#+

    Cost: T (left + right + 1) pairs, and about T / bq blocks more in partial ones. After d layers a
    query depends on d left keys before it.

    References: Beltagy et al., Longformer, 2020, arXiv:2004.05150.
    """
    if left < 0 or right < 0:
        raise ValueError(f"left and right must not be negative; got {left} and {right}.")
    return BlockMask.from_rule(Window(left, right), shape, block_size, q_offset=q_offset)


def sinks(
    shape: Sizes, block_size: Sizes, *, count: int, causal: bool = True, q_offset: int = 0
) -> BlockMask:
    """Each query sees the first `count` keys, on which softmax can park what it has left over.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        count: Tokens.
        causal: Whether a key that comes after a query stays hidden from it.
        q_offset: Position of the first query.

    Raises:
        ValueError: If `count` is below 1.

    Example:
        >>> from jaxsparse.attention import draw, sinks, sliding_window
        >>> streaming = sinks((12, 12), (2, 2), count=2) | sliding_window((12, 12), (2, 2), left=1)
        >>> print(draw(streaming))
        +.....
        #+....
        #++...
        #.++..
        #..++.
        #...++

    Cost: T count pairs.

    References: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
    arXiv:2309.17453.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}.")
    rule = Prefix(count) & CAUSAL if causal else Prefix(count)
    return BlockMask.from_rule(rule, shape, block_size, q_offset=q_offset)


def strided(
    shape: Sizes, block_size: Sizes, *, stride: int, merged: bool = False, q_offset: int = 0
) -> BlockMask:
    """Factorized attention of the Sparse Transformer: a window, and every `stride`-th key before.

    Half of the heads see keys i - stride to i, the other half keys j <= i with (i - j) mod stride =
    0. Two layers (or the two halves in one) connect every query with all keys before it.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        stride: Tokens, about sqrt(T) in the paper.
        merged: Whether every head sees both sets, instead of half of the heads each.
        q_offset: Position of the first query.

    Returns:
        A mask of two heads (so the heads of q must be even), or of one if `merged`.

    Raises:
        ValueError: If `stride` is below 1.

    Example:
        >>> from jaxsparse.attention import draw, strided
        >>> print(draw(strided((12, 12), (2, 2), stride=4)))
        +.....  +.....
        #+....  .+....
        +#+...  +.+...
        .+#+..  .+.+..
        ..+#+.  +.+.+.
        ...+#+  .+.+.+

    Cost: T stride + T^2 / (2 stride) pairs, but (bq + bkv) / stride of all blocks have one: it
    saves little where the stride is not several blocks long.

    Deviations: exact to the token; the paper's kernels worked on blocks. That two hops reach all of
    the past is tested.

    References: Child et al., Generating Long Sequences with Sparse Transformers, 2019,
    arXiv:1904.10509.
    """
    rules = Window(_positive(stride=stride), 0), Stride(stride) & CAUSAL
    return _two_heads(rules, shape, block_size, merged, q_offset)


def fixed(
    shape: Sizes,
    block_size: Sizes,
    *,
    stride: int,
    summary: int = 1,
    merged: bool = False,
    q_offset: int = 0,
) -> BlockMask:
    """Factorized attention of the Sparse Transformer: own chunk, and the ends of earlier chunks.

    Half of the heads see keys j <= i with floor(j / stride) = floor(i / stride), the other half
    keys j <= i with j mod stride >= stride - summary: the last tokens of a chunk, which have seen
    all of it, pass it on.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        stride: Tokens of a chunk.
        summary: c of the paper, tokens at the end of each chunk.
        merged: Whether every head sees both sets, instead of half of the heads each.
        q_offset: Position of the first query.

    Returns:
        A mask of two heads (so the heads of q must be even), or of one if `merged`. A head of the
        second half sees nothing until the first chunk ends.

    Raises:
        ValueError: Unless 1 <= summary <= stride.

    Example:
        >>> from jaxsparse.attention import draw, fixed
        >>> print(draw(fixed((12, 12), (2, 2), stride=4, summary=2)))
        +.....  ......
        #+....  .+....
        ..+...  .#....
        ..#+..  .#.+..
        ....+.  .#.#..
        ....#+  .#.#.+

    Cost: T stride / 2 + summary T^2 / (2 stride) pairs. Make `stride` and `summary` multiples of
    bkv, then hardly a block is partial.

    Deviations: exact to the token. That two hops reach all of the past is tested.

    References: Child et al., Generating Long Sequences with Sparse Transformers, 2019,
    arXiv:1904.10509.
    """
    if not 1 <= summary <= stride:
        raise ValueError(f"needs 1 <= summary <= stride; got {summary} and {stride}.")
    rules = Chunks(stride) & CAUSAL, Columns(stride, stride - summary) & CAUSAL
    return _two_heads(rules, shape, block_size, merged, q_offset)


def moa(
    shape: Sizes,
    block_size: Sizes,
    *,
    spans: Sequence[tuple[float, float]],
    sinks: int = 64,
    length: int | None = None,
    q_offset: int = 0,
) -> BlockMask:
    """Mixture of attention spans: every head has a window that grows with the input, and sinks.

    Head h sees the last S_h = a_h + b_h N tokens, itself one of them, and the first `sinks`.

    Args:
        shape: (T, S), queries and keys.
        block_size: (bq, bkv), tokens.
        spans: (a, b) of each head (or group of heads): tokens, and share of N.
        sinks: Tokens that every head sees; 0 for none.
        length: N, the length of the input; S if not given.
        q_offset: Position of the first query.

    Returns:
        A mask of len(spans) heads. S_h is rounded, and at least 1.

    Raises:
        ValueError: If there is no span.

    Example:
        >>> from jaxsparse.attention import draw, moa
        >>> print(draw(moa((12, 12), (2, 2), spans=[(2, 0.0), (1, 0.5)], sinks=2)))
        +.....  +.....
        #+....  #+....
        #++...  ##+...
        #.++..  ###+..
        #..++.  #+##+.
        #...++  #.+##+

    Cost: T (sum of S_h + sinks) pairs.

    Deviations: the search that finds the spans is not part of this. That sinks come on top of the
    span, and that there are 64 by default, is our reading.

    References: Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model
    Compression, 2024, arXiv:2406.14909.
    """
    if not spans:
        raise ValueError("spans must have (a, b) for at least one head; got none.")
    length = shape[1] if length is None else length

    def rule(a: float, b: float) -> Rule:
        window = Window(max(round(a + b * length), 1) - 1, 0)
        return window | (Prefix(sinks) & CAUSAL) if sinks else window

    masks = {
        span: BlockMask.from_rule(rule(*span), shape, block_size, q_offset=q_offset)
        for span in dict.fromkeys(map(tuple, spans))
    }
    return BlockMask.from_heads([masks[span] for span in map(tuple, spans)])


def _two_heads(
    rules: tuple[Rule, Rule], shape: Sizes, block_size: Sizes, merged: bool, q_offset: int
) -> BlockMask:
    """A head for each rule, or one head that sees what either allows."""
    if merged:
        return BlockMask.from_rule(rules[0] | rules[1], shape, block_size, q_offset=q_offset)
    return BlockMask.from_heads(
        [BlockMask.from_rule(rule, shape, block_size, q_offset=q_offset) for rule in rules]
    )


def _positive(**sizes: int) -> int:
    ((name, size),) = sizes.items()
    if size < 1:
        raise ValueError(f"{name} must be at least 1; got {size}.")
    return size
