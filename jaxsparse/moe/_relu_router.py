"""Experts where a rectified score is positive: differentiable, as many as the token needs.

References: Song et al., BlockFFN, 2025, arXiv:2507.08771.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.moe._routing import Router, Routing, check_choices


def relu_router(
    most: int,
    *,
    locality: float = 0.0,
    chunk_sparsity: float = 0.0,
    chunk: int = 8,
    sharpness: float = 100.0,
    length: int | None = None,
) -> Router:
    """Weights r = ReLU(logits) / rms(ReLU(logits)); experts with r > 0 are used.

    aux = locality * `locality_loss` + chunk_sparsity * `chunk_loss`: both make neighbouring tokens
    use the same experts, so that a chunk of tokens needs few of them.

    Args:
        most: Choices a token has room for; beyond it the smallest weights are left out.
        locality: Factor of the loss of activation locality.
        chunk_sparsity: Factor of the loss of chunk-level sparsity.
        chunk: Tokens of a chunk; divides the length.
        sharpness: Of the sigmoid in the loss of locality.
        length: Tokens of a sequence, if T are several of them one after the other; T if not given.

    Returns:
        A Router without state. A learned scale of each expert is that of the layer.

    Raises:
        ValueError: If `most` is not 1 to E, or lengths do not divide (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> routing = jsp.moe.relu_router(2).route(jnp.array([[1.0, -1.0], [3.0, 4.0]]), ())
        >>> routing.experts.tolist()
        [[0, 2], [1, 0]]

    Cost: a top-k of T E scores; no E-wide softmax.

    Deviations: the norm is over all E experts, absent ones counting as zero.

    References: Song et al., BlockFFN, 2025, arXiv:2507.08771.
    """

    def route(logits: jax.Array, state: Any = (), **_: Any) -> Routing:
        t, experts = logits.shape
        check_choices("relu_router", most, experts)
        logits = logits.astype(jnp.float32)
        r = jax.nn.relu(logits)
        r = r * jax.lax.rsqrt(jnp.mean(r * r, -1, keepdims=True) + 1e-6)
        weights, index = jax.lax.top_k(r, most)
        index = jnp.where(weights > 0, index, experts).astype(jnp.int32)
        aux = jnp.zeros((), jnp.float32)
        if locality or chunk_sparsity:
            size = t if length is None else length
            if t % size:
                raise ValueError(f"relu_router: length={size} must divide the {t} tokens.")
            shape = (t // size, size, experts)
            aux += locality * locality_loss(logits.reshape(shape), sharpness=sharpness)
            aux += chunk_sparsity * chunk_loss(r.reshape(shape), chunk)
        return Routing(weights, index, aux)

    return Router(route)


def locality_loss(logits: jax.Array, *, sharpness: float = 100.0) -> jax.Array:
    """Cross-entropy between the soft activation patterns of neighbouring tokens.

    Args:
        logits: `[..., T, E]`, before the rectifier.
        sharpness: alpha; the pattern is sigmoid(alpha * logits).

    Example:
        >>> from jaxsparse.moe import locality_loss
        >>> float(locality_loss(jnp.ones((3, 2)))) < 1e-6
        True
    """
    scaled = logits * sharpness
    here, after = scaled[..., :-1, :], jax.nn.sigmoid(scaled[..., 1:, :])
    # -(q log p + (1 - q) log(1 - p)), with log p = -softplus(-s).
    return jnp.mean(after * jax.nn.softplus(-here) + (1 - after) * jax.nn.softplus(here))


def chunk_loss(weights: jax.Array, chunk: int) -> jax.Array:
    """1 - mean over chunks and experts of prod over the tokens of the chunk of (1 - p).

    Args:
        weights: `[..., T, E]`, not negative; p is their share of the sum over the experts.
        chunk: Tokens of a chunk; divides T.

    Example:
        >>> from jaxsparse.moe import chunk_loss
        >>> float(chunk_loss(jnp.array([[1.0, 0.0], [1.0, 0.0]]), 2))
        0.5
    """
    *lead, t, experts = weights.shape
    if t % chunk:
        raise ValueError(f"chunk={chunk} must divide the {t} tokens of a sequence.")
    p = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    absent = jnp.prod((1 - p).reshape(*lead, t // chunk, chunk, experts), -2)
    return 1 - absent.mean()
