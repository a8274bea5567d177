"""Native sparse attention as a layer of `models.transformer`.

`Config(attention=NSA())` chooses it. Queries are shared by the three branches, keys and values are
not, as in the paper; a compressed key is made of keys before rotation, and stands where its last
token stands.

References: Yuan et al., Native Sparse Attention, 2025, arXiv:2502.11089.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse.attention import (
    KeyValue,
    MLPCompressor,
    NSASizes,
    PoolCompressor,
    compress,
    nsa_attention,
)
from models.transformer import Cache, Config, Linear, rope


@dataclasses.dataclass(frozen=True)
class NSA:
    """To compressed tokens, to the blocks they point at, and to a window.

    Attributes:
        sizes: of the branches.
        hidden: width of the perceptron that compresses; None for a weighted mean, which costs
            next to nothing.

    Example:
        >>> from models.transformer import SIZES, Transformer
        >>> config = dataclasses.replace(SIZES["tiny"], attention=NSA())
        >>> Transformer(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 40), jnp.int32)).shape
        (1, 40, 256)
    """

    sizes: NSASizes = NSASizes()
    hidden: int | None = 64

    def make(self, config: Config, *, rngs: nnx.Rngs) -> nnx.Module:
        """See `AttentionKind`."""
        return NSAAttention(config, self, rngs=rngs)

    def flops(self, config: Config) -> float:
        """Two products over the keys of all branches, and the compression of keys and values."""
        f, block = config.head_width, self.sizes.length * config.head_width
        seen = sum(self.sizes.keys_seen(config.context).values())
        one = 4 * block if self.hidden is None else 2 * self.hidden * (block + f)
        per_token = self.sizes.compressed(config.context) / config.context
        return 4.0 * config.heads * f * seen + 2.0 * config.kv_heads * one * per_token


class Compressor(nnx.Module):
    """The weights of `MLPCompressor` or `PoolCompressor`, for one of keys and values."""

    def __init__(self, config: Config, kind: NSA, *, rngs: nnx.Rngs):
        """Draw as `Linear` does; a weighted mean starts as the mean."""
        length, f, hidden = kind.sizes.length, config.head_width, kind.hidden

        def normal(rows: int, *columns: int) -> nnx.Param:
            draw = jax.random.normal(rngs.params(), (rows, *columns))
            return nnx.Param(draw * rows**-0.5)

        if hidden is None:
            self.score = nnx.Param(jnp.zeros(f))
            self.place = nnx.Param(jnp.zeros(length))
        else:
            self.up, self.down = normal(length * f, hidden), normal(hidden, f)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, f)))

    def function(self) -> MLPCompressor | PoolCompressor:
        """What `compress` takes."""
        position = self.position.get_value()
        if hasattr(self, "up"):
            return MLPCompressor(position, self.up.get_value(), self.down.get_value())
        return PoolCompressor(position, self.score.get_value(), self.place.get_value())


class NSAAttention(nnx.Module):
    """Native sparse attention with rotary positions."""

    def __init__(self, config: Config, kind: NSA, *, rngs: nnx.Rngs):
        """Make projections, gates and compressors."""
        self.config, self.kind = config, kind
        d, f, h, k = config.width, config.head_width, config.heads, config.kv_heads
        self.query = Linear(d, h * f, rngs=rngs)
        self.key = Linear(d, 3 * k * f, rngs=rngs)
        self.value = Linear(d, 3 * k * f, rngs=rngs)
        self.gate = Linear(d, 3 * h, rngs=rngs)
        self.out = Linear(h * f, d, rngs=rngs, scale=(2 * config.layers) ** -0.5)
        self.compress_key = Compressor(config, kind, rngs=rngs)
        self.compress_value = Compressor(config, kind, rngs=rngs)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] at positions [T], each one after the last -> [B, T, D] and None."""
        if cache is not None:
            raise NotImplementedError(
                f"the cache of keys and values serves Dense() attention only; got {self.kind}. "
                "Call the model on the whole text instead."
            )
        c, sizes = self.config, self.kind.sizes

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*x.shape[:-1], -1, c.head_width)

        shorten = partial(compress, length=sizes.length, stride=sizes.stride)
        q = rope(heads(self.query(x)), positions, c.rope_base)
        keys = jnp.split(heads(self.key(x)), 3, axis=2)
        values = jnp.split(heads(self.value(x)), 3, axis=2)
        coarse = KeyValue(
            rope(
                shorten(keys[0], self.compress_key.function()),
                positions[0] + sizes.ends(x.shape[1]),
                c.rope_base,
            ),
            shorten(values[0], self.compress_value.function()),
        )
        fine, near = (
            KeyValue(rope(k, positions, c.rope_base), v)
            for k, v in zip(keys[1:], values[1:], strict=True)
        )
        gates = jax.nn.sigmoid(self.gate(x)).reshape(*x.shape[:-1], c.heads, 3)
        y = nsa_attention(q, coarse, fine, near, gates, sizes=sizes)
        return self.out(y.reshape(*x.shape[:-1], -1)), None
