"""Sampling from a language model: one jitted program, keys and values cached in a ring."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.moe import MoETransformer
from models.transformer import Transformer


def generate(
    model: Transformer | MoETransformer,
    prompt: jax.Array,
    length: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Continue a prompt.

    The cache is a ring of `config.context` tokens: text may grow longer than the context, and each
    new token then attends to the last `context` ones. Of a longer prompt only its end is read.

    Args:
        model: the language model.
        prompt: int32 [B, P] with P >= 1.
        length: tokens to add, N >= 1; one program is compiled for each P and N.
        key: random key; not used at temperature 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only; all of them if None.

    Returns:
        int32 [B, P + N].

    Raises:
        ValueError: on an empty prompt, length < 1, a negative temperature or top_k outside 1..V.

    Example:
        >>> from models.transformer import SIZES
        >>> model = Transformer(SIZES["tiny"], rngs=nnx.Rngs(0))
        >>> generate(model, jnp.zeros((1, 3), jnp.int32), 5, key=jax.random.key(0)).shape
        (1, 8)
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1 or length < 1:
        raise ValueError(
            f"generate needs a prompt [B, P] with P >= 1 and length >= 1; got a prompt of shape "
            f"{prompt.shape} and length={length}."
        )
    if temperature < 0 or not (top_k is None or 1 <= top_k <= model.config.vocab):
        raise ValueError(
            f"generate needs temperature >= 0 and top_k in 1..{model.config.vocab}; got "
            f"{temperature} and {top_k}."
        )
    graph, params = nnx.split(model)
    read = prompt[:, -model.config.context :]
    new = _decode(graph, params, read, key, length, temperature, top_k)
    return jnp.concatenate([prompt, new], axis=1)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _decode(
    graph: Any,
    params: Any,
    prompt: jax.Array,
    key: jax.Array,
    length: int,
    temperature: float,
    top_k: int | None,
) -> jax.Array:
    model = nnx.merge(graph, params)
    batch, start = prompt.shape
    cache = model.empty_cache(batch, min(model.config.context, start + length))
    logits, cache = model.apply(prompt, jnp.arange(start), cache)

    def token(carry, inputs):
        logits, cache = carry
        key, position = inputs
        new = _sample(logits, key, temperature, top_k)
        logits, cache = model.apply(new[:, None], position[None], cache)
        return (logits[:, -1], cache), new

    inputs = jax.random.split(key, length), start + jnp.arange(length)
    _, new = jax.lax.scan(token, (logits[:, -1], cache), inputs)
    return new.T.astype(prompt.dtype)


def _sample(logits: jax.Array, key: jax.Array, temperature: float, top_k: int | None) -> jax.Array:
    """One token for each row: [B, V] -> [B]."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature)
