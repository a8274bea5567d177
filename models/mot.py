"""Mixture of transformers: every modality has weights of its own, and all attend to all.

Projections, norms and feed-forward layers of a block are stacked by modality, `[E, in, out]`, and
a token uses those of its own, which is known: tokens are sorted by modality once, the products of
the block are grouped, and only attention sees the mixed sequence in its order.

Shape letters: B texts, T tokens, D width, E modalities, R = B T rows.

Reference: Liang et al., Mixture-of-transformers: A sparse and scalable architecture for multi-modal
foundation models, 2024, arXiv:2411.04996.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models.transformer import Config, rope
from pallas_kernels import grouped_ffn, grouped_matmul


class MoTBlock(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x), all but attention itself by modality.

    Example:
        >>> config = Config(width=8, heads=2, kv_heads=1, head_width=4, hidden=16)
        >>> block = MoTBlock(config, 2, rngs=nnx.Rngs(0))
        >>> modality = jnp.array([[0, 0, 1, 1, 0]])
        >>> block(jnp.ones((1, 5, 8)), modality).shape
        (1, 5, 8)

    Cost: the FLOPs of the dense block; two gathers of rows to sort and two back.

    Deviations: the projections of all modalities have one shape; also the norm before attention is
        by modality, and there is no norm of queries and keys, as in `transformer.py`.
    """

    def __init__(self, config: Config, modalities: int, *, rngs: nnx.Rngs):
        """Random weights."""
        self.config, self.modalities = config, modalities
        d, f = config.width, config.head_width
        last = (2 * config.layers) ** -0.5

        def normal(rows: int, columns: int, scale: float = 1.0) -> nnx.Param:
            shape = (modalities, rows, columns)
            return nnx.Param(scale * rows**-0.5 * jax.random.normal(rngs.params(), shape))

        self.query = normal(d, config.heads * f)
        self.key, self.value = (normal(d, config.kv_heads * f) for _ in range(2))
        self.out = normal(config.heads * f, d, last)
        self.gate, self.up = (normal(d, config.hidden) for _ in range(2))
        self.down = normal(config.hidden, d, last)
        self.attention_norm, self.mlp_norm = (nnx.Param(jnp.ones((modalities, d))) for _ in "ab")

    def __call__(self, x: jax.Array, modality: jax.Array) -> jax.Array:
        """[B, T, D] of modalities int [B, T], 0 to E - 1 -> [B, T, D]."""
        c, (batch, tokens, width) = self.config, x.shape
        sort, unsort, sizes, own = _by_modality(modality.ravel(), self.modalities)

        def product(rows: jax.Array, weight: nnx.Param) -> jax.Array:
            return grouped_matmul(rows, weight.get_value().astype(rows.dtype), sizes)

        def mixed(rows: jax.Array) -> jax.Array:
            return unsort(rows).reshape(batch, tokens, -1, c.head_width)

        rows = sort(x.reshape(-1, width))
        normed = _norm(rows, self.attention_norm.get_value()[own])
        q, k, v = (mixed(product(normed, w)) for w in (self.query, self.key, self.value))
        positions = jnp.arange(tokens)
        q, k = rope(q, positions, c.rope_base), rope(k, positions, c.rope_base)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        rows = rows + product(sort(y.reshape(batch * tokens, -1)), self.out)
        normed = _norm(rows, self.mlp_norm.get_value()[own])
        gate, up, down = (w.get_value().astype(x.dtype) for w in (self.gate, self.up, self.down))
        rows = rows + grouped_ffn(normed, gate, up, down, sizes, activation=jax.nn.silu)
        return unsort(rows).reshape(x.shape)


Move = Callable[[jax.Array], jax.Array]


def _by_modality(modality: jax.Array, number: int) -> tuple[Move, Move, jax.Array, jax.Array]:
    """Rows to the order of modalities and back, rows of each, and the modality of each row."""
    order = jnp.argsort(modality, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.sum(modality[:, None] == jnp.arange(number), 0, dtype=jnp.int32)
    sort, unsort = _permutation(order, back), _permutation(back, order)
    return sort, unsort, sizes, modality[order]


def _permutation(there: jax.Array, back: jax.Array) -> Move:
    """Rows in another order; the gradient is a gather too, not a scatter."""

    @jax.custom_vjp
    def move(rows, there, back):
        return rows[there]

    move.defvjp(lambda r, t, b: (r[t], b), lambda b, d: (d[b], None, None))
    return lambda rows: move(rows, there, back)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return (y * scale).astype(x.dtype)
