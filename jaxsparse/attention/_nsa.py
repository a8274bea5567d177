"""Native sparse attention (NSA): a compressed, a selected and a window branch, mixed by gates.

Shape letters: B batch, T tokens, H query heads, K key-value heads, D head width, N compressed
tokens, R query blocks, J selection blocks.

References: Yuan et al., Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse
Attention, 2025, arXiv:2502.11089.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.attention._compress import compressed_tokens
from jaxsparse.attention._select import top_k_blocks
from jaxsparse.attention._window_patterns import sliding_window
from pallas_kernels import block_sparse_attention

_TILE = 128  # queries that the compressed branch takes at a time


class KeyValue(NamedTuple):
    """Keys and values of one branch, each `[B, T, K, D]`, or `[B, N, K, D]` if compressed.

    Example:
        >>> KeyValue(jnp.ones((1, 8, 2, 4)), jnp.zeros((1, 8, 2, 4))).key.shape
        (1, 8, 2, 4)
    """

    key: jax.Array
    value: jax.Array


def first_query(probabilities: jax.Array) -> jax.Array:
    """A query block selects by its first query: what later ones ask has no influence. Causal.

    Args:
        probabilities: `[..., query_block, N]`.

    Returns:
        `[..., N]`.

    Example:
        >>> first_query(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [1.0, 0.0]
    """
    return probabilities[..., 0, :]


def all_queries(probabilities: jax.Array) -> jax.Array:
    """A query block selects by the sum over its queries. NOT causal inside a query block.

    Which blocks a query sees then depends on up to query_block - 1 later tokens, and a decoder,
    that does not have them, selects otherwise. For encoders, prefill of a known prompt, or
    `query_block=1`, where it is `first_query`.

    Args:
        probabilities: `[..., query_block, N]`.

    Returns:
        `[..., N]`.

    Example:
        >>> all_queries(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [1.0, 1.0]
    """
    return probabilities.sum(-2)


@dataclasses.dataclass(frozen=True)
class NSASizes:
    """Sizes of native sparse attention; the defaults are the paper's, but for `query_block`.

    Attributes:
        length: l, tokens in a compressed token; a multiple of `stride`.
        stride: d, tokens from one compressed token to the next; divides `select_block`.
        select_block: l', tokens in a selection block.
        count: n, selection blocks of a query block, forced ones included.
        initial: First blocks, always selected.
        local: Blocks up to the query's own, always selected; at least 1.
        window: w, tokens that the window branch sees, the query's own included.
        query_block: Queries that share a selection; 1 in the paper.
        importance: How the queries of a block share it: `first_query`, or `all_queries`, which is
            not causal.

    Example:
        >>> NSASizes().count * NSASizes().select_block
        1024
    """

    length: int = 32
    stride: int = 16
    select_block: int = 64
    count: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512
    query_block: int = 16
    importance: Callable[[jax.Array], jax.Array] = first_query

    def __post_init__(self) -> None:
        """Raise ValueError on sizes that do not fit."""
        for name in ("length", "stride", "select_block", "local", "window", "query_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"NSASizes needs {name} >= 1; got {getattr(self, name)}.")
        for one, other in (
            ("length", "stride"),
            ("select_block", "stride"),
        ):
            a, b = getattr(self, one), getattr(self, other)
            if a % b:
                raise ValueError(f"NSASizes needs {one} to be a multiple of {other}; got {a}, {b}.")
        if self.initial < 0 or self.count < self.initial + self.local:
            raise ValueError(
                f"NSASizes needs count >= initial + local, initial >= 0; got count={self.count}, "
                f"initial={self.initial}, local={self.local}."
            )

    def compressed(self, tokens: int) -> int:
        """N, the compressed tokens of so many tokens; 0 if there are fewer than `length`."""
        return compressed_tokens(tokens, self.length, self.stride)

    def ends(self, tokens: int) -> jax.Array:
        """int32 `[N]`: position of the last token in each compressed one; seen from there on."""
        first = jnp.arange(self.compressed(tokens), dtype=jnp.int32) * self.stride
        return first + (self.length - 1)

    def keys_seen(self, tokens: int) -> dict[str, float]:
        """Keys that a query is multiplied with, the mean over `tokens` queries, by branch.

        Selected and window keys count in whole listed blocks.
        """
        t, size = tokens, self.select_block
        ends = range(self.length - 1, t, self.stride)
        last = [min(i + self.query_block, t) - 1 for i in range(0, t, self.query_block)]
        selected = sum(min(self.count, j // size + 1) for j in last) * self.query_block * size
        back = self.window - 1
        rows = range(0, t, size)
        window = sum(r // size - max(0, r - back) // size + 1 for r in rows) * size * size
        return {
            "compressed": sum(t - end for end in ends) / t,
            "selected": selected / t,
            "window": window / t,
        }


def compressed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sizes: NSASizes,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to compressed tokens, and what it tells of the importance of selection blocks.

    The importance of a block is the probability of the compressed tokens, each as often as it has
    strides in the block (equation 9), summed over the query heads of a key-value head (equation
    10). No gradient flows through it.

    Args:
        q: `[B, T, H, D]`.
        k: Compressed, `[B, N, K, D]`.
        v: Compressed, `[B, N, K, D]`.
        sizes: As in `nsa_attention`.
        scale: Of the scores; D ** -0.5 if not given.

    Returns:
        out `[B, T, H, D]`, zeros for a query before the end of the first compressed token; and
        float32 `[B, K, R, J]`, the importance of J blocks for R blocks of queries.

    Example:
        >>> sizes = NSASizes(4, 2, 4, count=2, initial=0, local=1, query_block=2)
        >>> q, k = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 3, 1, 4))
        >>> out, importance = compressed_attention(q, k, k, sizes)
        >>> out.shape, importance.shape
        ((1, 8, 2, 4), (1, 1, 4, 2))

    Cost: 4 T N D FLOPs a head forward, memory O(T) beside a tile of 128 x N probabilities, which
    the backward pass makes again.
    """
    b, t, h, d = q.shape
    number, heads = k.shape[1:3]
    if number != sizes.compressed(t):
        raise ValueError(
            f"{t} tokens make {sizes.compressed(t)} compressed ones for length={sizes.length}, "
            f"stride={sizes.stride}; got {number}."
        )
    factor = d**-0.5 if scale is None else scale
    bq, columns = sizes.query_block, -(-t // sizes.select_block)
    tile = bq * max(1, min(_TILE, t) // bq)
    tiles = -(-t // tile)
    ends = sizes.ends(t)
    padded = jnp.pad(q, ((0, 0), (0, tiles * tile - t), (0, 0), (0, 0)))
    q_tiles = padded.reshape(b, tiles, tile, heads, h // heads, d).transpose(1, 0, 3, 4, 2, 5)
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # [B, K, D, N], [B, K, N, D]

    @jax.checkpoint
    def step(_: None, inputs: Any) -> Any:
        q, first = inputs
        at = first + jnp.arange(tile, dtype=jnp.int32)
        scores = jnp.einsum("bkgtd,bkdn->bkgtn", q, keys, preferred_element_type=jnp.float32)
        seen = ends <= at[:, None]
        scores = jnp.where(seen, scores * factor, -jnp.inf)
        high = lax.stop_gradient(scores.max(-1, keepdims=True, initial=-1e30))
        p = jnp.exp(scores - high)
        p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)  # the largest is 1 if there is one
        out = jnp.einsum("bkgtn,bknd->bkgtd", p.astype(v.dtype), values)
        shared = lax.stop_gradient(p).sum(2).reshape(b, heads, tile // bq, bq, number)
        return None, (out, _of_blocks(sizes.importance(shared), sizes, columns))

    first = jnp.arange(tiles, dtype=jnp.int32) * tile
    _, (out, importance) = lax.scan(step, None, (q_tiles, first))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, tiles * tile, h, d)[:, :t]
    importance = importance.transpose(1, 2, 0, 3, 4).reshape(b, heads, -1, columns)
    return out.astype(q.dtype), importance[:, :, : -(-t // bq)]


def nsa_attention(
    q: jax.Array,
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: jax.Array,
    *,
    sizes: NSASizes,
    scale: float | None = None,
    return_block_mask: bool = False,
    implementation: str | None = None,
) -> Any:
    """Causal attention to compressed tokens, to the blocks they point at, and to a window.

    out = gate_1 compressed + gate_2 selected + gate_3 window; the heads of a group share the
    selected blocks. Each branch has keys and values of its own, so that none learns for another.

    Args:
        q: `[B, T, H, D]`.
        compressed: From `compress`, `[B, N, K, D]`; K divides H.
        selected: `[B, T, K, D]`.
        window: `[B, T, K, D]`.
        gates: `[B, T, H, 3]`, of the branches in that order; in the paper sigmoids of the input.
        sizes: Of the branches.
        scale: Of the scores; D ** -0.5 if not given.
        return_block_mask: Also return the `BlockMask` of the selected branch, of K heads.
        implementation: Of `block_sparse_attention`.

    Returns:
        `[B, T, H, D]` of the dtype of q; and the mask, if asked for.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> sizes = NSASizes(4, 2, 4, count=2, initial=0, local=1, window=4, query_block=2)
        >>> q, x, c = (jnp.ones((1, n, h, 4)) for n, h in ((8, 2), (8, 1), (3, 1)))
        >>> branches = KeyValue(c, c), KeyValue(x, x), KeyValue(x, x)
        >>> nsa_attention(q, *branches, jnp.ones((1, 8, 2, 3)), sizes=sizes)[0, :, 0, 0].tolist()
        [2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]

    Cost: about `sum(sizes.keys_seen(T).values())` keys for each query, 4 D FLOPs each and head
    forward, 10 backward; the compressed branch computes the keys of its future too.
    Deviations: `query_block` queries share a selection (`NSASizes.query_block`); by default it is
    that of the first of them, so the choice never looks ahead, and a decoder makes the same one.
    Equation 9 is read as overlap: its index runs backwards in print. No step for decoding yet.
    References: Yuan et al., Native Sparse Attention, 2025, arXiv:2502.11089.
    """
    b, t, h, _ = q.shape
    if gates.shape != (b, t, h, 3):
        raise ValueError(f"gates must be [B, T, H, 3] = {(b, t, h, 3)}; got {gates.shape}.")
    options: Any = {"scale": scale, "implementation": implementation}
    coarse, importance = compressed_attention(q, *compressed, sizes, scale=scale)
    mask = top_k_blocks(
        importance,
        (t, t),
        (sizes.query_block, sizes.select_block),
        count=sizes.count,
        causal=True,
        sinks=sizes.initial,
        local=sizes.local,
    )
    fine = block_sparse_attention(q, *selected, mask, **options)
    blocks = (sizes.select_block, sizes.select_block)
    near = sliding_window((t, t), blocks, left=sizes.window - 1)
    local = block_sparse_attention(q, *window, near, **options)
    gates = gates.astype(q.dtype)
    out = gates[..., :1] * coarse + gates[..., 1:2] * fine + gates[..., 2:] * local
    return (out, mask) if return_block_mask else out


def _of_blocks(p: jax.Array, sizes: NSASizes, columns: int) -> jax.Array:
    """Sums over strides of what compressed tokens [..., N] have: importance of blocks [..., J]."""
    per = sizes.length // sizes.stride
    lead = [(0, 0)] * (p.ndim - 1)
    number = p.shape[-1]
    strides = sum(jnp.pad(p, [*lead, (i, per - 1 - i)]) for i in range(per))
    end = columns * (sizes.select_block // sizes.stride)
    strides = jnp.pad(jnp.asarray(strides), [*lead, (0, max(0, end - number - per + 1))])
    return strides[..., :end].reshape(*p.shape[:-1], columns, -1).sum(-1)
