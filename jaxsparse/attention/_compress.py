"""Compressed tokens: overlapping blocks of keys or values, each made into one by learned weights.

References: Yuan et al., Native Sparse Attention, 2025, arXiv:2502.11089, section 3.3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class MLPCompressor(NamedTuple):
    """A block of tokens through a two-layer perceptron: gelu(flat(x + position) up) down.

    Attributes:
        position: `[length, D]`, embedding of the place inside the block.
        up: `[length * D, M]`.
        down: `[M, D]`.

    Example:
        >>> mlp = MLPCompressor(jnp.zeros((4, 2)), jnp.ones((8, 3)), jnp.ones((3, 2)))
        >>> mlp(jnp.ones((5, 4, 2))).shape
        (5, 2)
    """

    position: jax.Array
    up: jax.Array
    down: jax.Array

    def __call__(self, blocks: jax.Array) -> jax.Array:
        """[..., length, D] -> [..., D]."""
        x = blocks + self.position.astype(blocks.dtype)
        x = x.reshape(*x.shape[:-2], -1) @ self.up.astype(x.dtype)
        return jax.nn.gelu(x) @ self.down.astype(x.dtype)


class PoolCompressor(NamedTuple):
    """A weighted mean of the tokens of a block; softmax of x . score + place gives the weights.

    For small models, in which the perceptron would cost more than the attention it feeds.

    Attributes:
        position: `[length, D]`, embedding of the place inside the block, added to the tokens.
        score: `[D]`, which tokens count.
        place: `[length]`, which places count.

    Example:
        >>> pool = PoolCompressor(jnp.zeros((4, 2)), jnp.zeros(2), jnp.zeros(4))
        >>> pool(jnp.arange(8.0).reshape(4, 2)).tolist()
        [3.0, 4.0]
    """

    position: jax.Array
    score: jax.Array
    place: jax.Array

    def __call__(self, blocks: jax.Array) -> jax.Array:
        """[..., length, D] -> [..., D]."""
        x = blocks + self.position.astype(blocks.dtype)
        weights = jax.nn.softmax((x @ self.score.astype(x.dtype)) + self.place.astype(x.dtype))
        return jnp.einsum("...l,...ld->...d", weights, x)


def compressed_tokens(tokens: int, length: int, stride: int) -> int:
    """How many blocks of `length` tokens, one every `stride`, lie wholly in so many tokens."""
    return max(0, (tokens - length) // stride + 1)


def compress(
    x: jax.Array, compressor: Callable[[jax.Array], jax.Array], *, length: int, stride: int
) -> jax.Array:
    """Compressed tokens: `compressor` on overlapping blocks of keys or values.

    Args:
        x: `[B, T, K, D]`.
        compressor: `[..., length, D]` -> `[..., D]`, such as `MLPCompressor`.
        length: Tokens in a compressed one; a multiple of `stride`.
        stride: Tokens from the first of one to the first of the next.

    Returns:
        `[B, N, K, D]`; token i is made of tokens i stride to i stride + length - 1. A tail that
        does not fill a block is in none.

    Raises:
        ValueError: If `length` is no multiple of `stride`.

    Example:
        >>> x = jnp.arange(8.0).reshape(1, 8, 1, 1)
        >>> compress(x, lambda block: block.mean(-2), length=4, stride=2).ravel()
        Array([1.5, 3.5, 5.5], dtype=float32)

    Cost: a copy of x, length / stride times as large.
    """
    b, t, heads, d = x.shape
    if stride < 1 or length < 1 or length % stride:
        raise ValueError(f"length must be a multiple of stride; got {length} and {stride}.")
    number, per = compressed_tokens(t, length, stride), length // stride
    if not number:
        return jnp.zeros((b, 0, heads, d), x.dtype)
    chunks = x[:, : (number + per - 1) * stride].swapaxes(1, 2)
    chunks = chunks.reshape(b, heads, number + per - 1, stride, d)
    blocks = jnp.concatenate([chunks[:, :, i : i + number] for i in range(per)], axis=3)
    return compressor(blocks).swapaxes(1, 2)
