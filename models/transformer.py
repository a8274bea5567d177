"""A decoder language model in the shape people train today, in flax.nnx.

RMSNorm before each sublayer, rotary positions (RoPE), SwiGLU, grouped-query attention, layers that
are scanned: every weight of the blocks is one stacked array `[L, in, out]`. Each linear layer says
`x @ w` with `w` its parameter `kernel`, so an array can give way to any sparse weight object.
What a token attends to is an object: `Dense()`, `Static(pattern)` or `models.nsa.NSA()`.

Shape letters: B batch, T tokens, S cached tokens, D width, H query heads, K key-value heads,
F head width, L layers, V vocabulary.

References: Touvron et al., Llama, 2023, arXiv:2302.13971; Su et al., RoFormer, 2021,
arXiv:2104.09864; Shazeer, GLU variants, 2020, arXiv:2002.05202; Ainslie et al., GQA, 2023,
arXiv:2305.13245.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxsparse.attention import BlockMask, block_sparse_attention


class AttentionKind(Protocol):
    """What a token attends to. A frozen dataclass: equal ones share a compiled program."""

    def make(self, config: Config, *, rngs: nnx.Rngs) -> nnx.Module:
        """A layer that is called as `Attention` is."""
        ...

    def flops(self, config: Config) -> float:
        """Forward FLOPs of a token in one layer, beside those of the matrices named `kernel`."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """To every token before it, and to itself."""

    def make(self, config: Config, *, rngs: nnx.Rngs) -> nnx.Module:
        """See `AttentionKind`."""
        return Attention(config, rngs=rngs)

    def flops(self, config: Config) -> float:
        """Two products over the (context + 1) / 2 tokens that a token sees on average."""
        return 2.0 * config.heads * config.head_width * (config.context + 1)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """[B, T, H, F] and two of [B, T, K, F] -> [B, T, H, F]."""
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@dataclasses.dataclass(frozen=True)
class Static(Dense):
    """To those that a pattern lists among the tokens before it, and itself; parameters as `Dense`.

    Attributes:
        pattern: Tokens T -> `BlockMask` of T queries and T keys, of 1 head or of a number that
            divides `heads`. Give the same function each time: it is part of the config.
    """

    pattern: Callable[[int], BlockMask]

    def flops(self, config: Config) -> float:
        """Two products over the listed blocks that reach into the past, counted whole."""
        mask = self.pattern(config.context)
        (bq, bkv), (rows, cols) = mask.block_size, mask.grid
        triangle = sum(min(cols, -(-(r + 1) * bq // bkv)) for r in range(rows))
        seen = float(mask.density(causal=True)) * triangle * bq * bkv / config.context
        return 4.0 * config.heads * config.head_width * seen

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """See `Dense`."""
        return block_sparse_attention(q, k, v, self.pattern(q.shape[1]), causal=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a `Transformer`.

    Attributes:
        vocab: V, number of tokens; 256 for bytes.
        width: D, size of the residual stream.
        layers: L, number of blocks.
        heads: H, query heads; H * head_width need not be the width.
        kv_heads: K, key and value heads; divides `heads`. K = H is plain multi-head attention.
        head_width: F, even, for the rotation works on pairs.
        hidden: width of the SwiGLU.
        context: tokens seen in training, and length of the ring that caches keys and values.
        rope_base: base of the rotary wavelengths.
        attention: what a token attends to.
        tied: use the embedding as the head as well.
        remat: compute each block again in the backward pass instead of keeping its activations.
        unroll: layers per iteration of the scan; `layers` unrolls it whole.
        dtype: of activations and of the matrix products; parameters and norms are float32.
    """

    vocab: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 64
    hidden: int = 704
    context: int = 256
    rope_base: float = 10_000.0
    attention: AttentionKind = Dense()
    tied: bool = False
    remat: bool = False
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Raise ValueError on shapes that cannot be."""
        for field in ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "hidden"):
            if getattr(self, field) < 1:
                raise ValueError(f"Config needs {field} >= 1; got {getattr(self, field)}.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"Config needs heads to be a multiple of kv_heads; got {self.heads} and "
                f"{self.kv_heads}. Choose kv_heads={self.heads} for plain multi-head attention."
            )
        if self.head_width % 2:
            raise ValueError(f"Config needs an even head_width for RoPE; got {self.head_width}.")


SIZES: dict[str, Config] = {
    "tiny": Config(
        width=128, layers=2, heads=4, kv_heads=2, head_width=32, hidden=352, context=128, unroll=2
    ),
    "small": Config(
        width=256, layers=2, heads=4, kv_heads=2, head_width=64, hidden=704, context=128, unroll=2
    ),
    "wide": Config(
        width=640, layers=2, heads=4, kv_heads=2, head_width=64, hidden=1920, context=128, unroll=2
    ),
    "base": Config(width=512, layers=8, heads=8, kv_heads=4, hidden=1408, context=512),
    "medium": Config(width=768, layers=12, heads=12, kv_heads=4, hidden=2048, context=1024),
    "large": Config(
        width=1024, layers=24, heads=16, kv_heads=4, hidden=2816, context=2048, remat=True
    ),
    "1b": Config(
        width=2048, layers=22, heads=32, kv_heads=4, hidden=5632, context=2048, remat=True
    ),
}
"""Named sizes: 0.4M, 1.6M, 8.7M, 24M, 76M, 271M and 970M parameters, with a vocabulary of bytes."""


class Cache(NamedTuple):
    """Keys and values of the last S tokens of every layer, each `[L, B, S, K, F]`: a ring."""

    key: jax.Array
    value: jax.Array


class Linear(nnx.Module):
    """`x @ w` without bias; `kernel` is [in, out] and may become any weight with `x @ w`."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs, scale: float = 1.0):
        """Draw the kernel from a normal of standard deviation `scale / sqrt(d_in)`."""
        std = scale / d_in**0.5
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        return x @ _cast(self.kernel.get_value(), x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, width: int):
        """Start at scale one."""
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], of the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        return (y * self.scale.get_value()).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Make the four projections."""
        self.config = config
        d, f = config.width, config.head_width
        self.query = Linear(d, config.heads * f, rngs=rngs)
        self.key = Linear(d, config.kv_heads * f, rngs=rngs)
        self.value = Linear(d, config.kv_heads * f, rngs=rngs)
        self.out = Linear(config.heads * f, d, rngs=rngs, scale=(2 * config.layers) ** -0.5)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] at positions [T] -> [B, T, D] and the cache (of one layer) with x in it."""
        f, base = self.config.head_width, self.config.rope_base
        q, k, v = (
            project(x).reshape(*x.shape[:-1], -1, f)
            for project in (self.query, self.key, self.value)
        )
        q, k = rope(q, positions, base), rope(k, positions, base)
        attention: Any = self.config.attention
        if cache is None:
            y = attention.attend(q, k, v)
        elif type(attention) is not Dense:
            raise NotImplementedError(
                f"the cache of keys and values serves Dense() attention only; got {attention}. "
                "Call the model on the whole text instead."
            )
        else:  # a ring: slot = position mod S; an empty slot is one after the last position
            size = cache.key.shape[1]
            write = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            slot = positions[0] % size
            cache = Cache(write(cache.key, k, slot), write(cache.value, v, slot))
            mask = jnp.arange(size) <= positions[:, None]
            y = jax.nn.dot_product_attention(q, cache.key, cache.value, mask=mask[None, None])
        return self.out(y.reshape(*x.shape[:-1], -1)), cache


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Make the three projections."""
        d, h = config.width, config.hidden
        self.gate = Linear(d, h, rngs=rngs)
        self.up = Linear(d, h, rngs=rngs)
        self.down = Linear(h, d, rngs=rngs, scale=(2 * config.layers) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Make one layer; `Transformer` stacks L of them."""
        self.attention_norm = RMSNorm(config.width)
        self.attention = config.attention.make(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D] and the updated cache."""
        y, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nnx.Module):
    """The language model; parameters are `embed/embedding`, `layers/...`, `norm`, `head/kernel`.

    Example:
        >>> model = Transformer(SIZES["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 256)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Make the model; under `nnx.eval_shape` this allocates nothing."""
        self.config = config
        self.embed = nnx.Embed(
            config.vocab, config.width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        stack = nnx.vmap(lambda r: Block(config, rngs=r), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=config.layers)(stack)(rngs)
        self.norm = RMSNorm(config.width)
        if not config.tied:
            self.head = Linear(config.width, config.vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token: int32 [B, T] -> float32 [B, T, V]."""
        return self.apply(tokens, jnp.arange(tokens.shape[1]))[0]

    def apply(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Logits of tokens [B, T] that stand at positions [T], and the cache with them in it."""
        c = self.config
        x = self.embed.embedding.get_value()[tokens].astype(c.dtype)
        graph, stacked = nnx.split(self.layers)

        def layer(x, inputs):
            weights, cache = inputs
            return nnx.merge(graph, weights)(x, positions, cache)

        step = jax.checkpoint(layer) if c.remat else layer
        x, cache = jax.lax.scan(step, x, (stacked, cache), length=c.layers, unroll=c.unroll)
        x = self.norm(x)
        if c.tied:
            logits = x @ (self.embed.embedding.get_value().T * c.width**-0.5).astype(x.dtype)
        else:
            logits = self.head(x)
        return logits.astype(jnp.float32), cache

    def empty_cache(self, batch: int, size: int) -> Cache:
        """A cache for `size` tokens."""
        c = self.config
        shape = (c.layers, batch, size, c.kv_heads, c.head_width)
        return Cache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Turn the pairs (x[i], x[i + F/2]) by position * base^(-2i/F): [B, T, H, F] -> same."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-jnp.arange(half) / half)  # [T, F/2]
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _cast(weight: Any, dtype: DTypeLike) -> Any:
    """The weight, array or sparse object, with its floating leaves in dtype."""
    return jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, weight
    )
