"""Routers that learn nothing: by hash, at random, or by an index known beforehand.

References: Roller et al., Hash layers, 2021, arXiv:2106.04426; Zuo et al., THOR, 2021,
arXiv:2110.04260.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.moe._routing import Router, Routing, check_choices


def hashed(k: int = 1, *, seed: int = 0) -> Router:
    """Experts by a fixed hash of the token's number in the vocabulary (evidence `tokens`).

    Args:
        k: Experts a token; the hash names the first, the others follow it.
        seed: Another one gives another hash.

    Returns:
        A Router without state; every weight is 1/k.

    Raises:
        ValueError: If k is not 1 to E, or `tokens` missing (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> logits = jnp.zeros((3, 4))  # only their shape counts
        >>> routing = jsp.moe.hashed().route(logits, (), tokens=jnp.array([5, 9, 5]))
        >>> bool(routing.experts[0, 0] == routing.experts[2, 0])
        True

    Cost: nothing to speak of.

    Deviations: a multiplicative hash, not the paper's balanced table, which needs token counts.

    References: Roller et al., Hash layers, 2021, arXiv:2106.04426.
    """

    def route(logits: jax.Array, state: Any = (), *, tokens: jax.Array | None = None, **_: Any):
        number = logits.shape[-1]
        check_choices("hashed", k, number)
        if tokens is None or tokens.shape != logits.shape[:1]:
            got = None if tokens is None else tokens.shape
            raise ValueError(f"hashed needs tokens= of shape {logits.shape[:1]}; got {got}.")
        h = (tokens.astype(jnp.uint32) + jnp.uint32(seed)) * jnp.uint32(2654435769)
        h = (h ^ (h >> 15)) * jnp.uint32(2246822519)
        first = ((h ^ (h >> 13)) % jnp.uint32(number)).astype(jnp.int32)
        return _even((first[:, None] + jnp.arange(k, dtype=jnp.int32)) % number, number)

    return Router(route)


def random(k: int = 1) -> Router:
    """As many as k different experts, drawn for every token (evidence `key`).

    Args:
        k: Experts a token.

    Returns:
        A Router without state; every weight is 1/k.

    Raises:
        ValueError: If k is not 1 to E, or `key` missing (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> jsp.moe.random(2).route(jnp.zeros((5, 4)), (), key=jax.random.key(0)).experts.shape
        (5, 2)

    Cost: T E random numbers and a top-k.

    References: Zuo et al., THOR, 2021, arXiv:2110.04260.
    """

    def route(logits: jax.Array, state: Any = (), *, key: jax.Array | None = None, **_: Any):
        check_choices("random", k, logits.shape[-1])
        if key is None:
            raise ValueError("random needs key=, a jax.random.key.")
        noise = jax.random.uniform(key, logits.shape)
        return _even(jax.lax.top_k(noise, k)[1].astype(jnp.int32), logits.shape[-1])

    return Router(route)


def given() -> Router:
    """Experts known beforehand: a modality, a task's skills, a range of time (evidence `given`).

    Returns:
        A Router without state; weights are equal over the choices in use.

    Raises:
        ValueError: If `given` is missing or of another shape (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> which = jnp.array([[0, 2], [1, 3]])  # expert 3 of 3 is none
        >>> jsp.moe.given().route(jnp.zeros((2, 3)), (), given=which).weights.tolist()
        [[0.5, 0.5], [1.0, 0.0]]

    Cost: nothing to speak of.
    """

    def route(logits: jax.Array, state: Any = (), *, given: jax.Array | None = None, **_: Any):
        if given is None or given.shape[:1] != logits.shape[:1] or given.ndim > 2:
            got = None if given is None else given.shape
            raise ValueError(f"needs given= [{logits.shape[0]}] or [{logits.shape[0]}, k]; {got=}.")
        return _even(given.reshape(given.shape[0], -1).astype(jnp.int32), logits.shape[-1])

    return Router(route)


def _even(experts: jax.Array, number: int) -> Routing:
    """Equal weights over the choices that name an expert."""
    used = (experts >= 0) & (experts < number)
    weights = used / jnp.maximum(used.sum(-1, keepdims=True), 1)
    experts = jnp.where(used, experts, number)
    return Routing(weights.astype(jnp.float32), experts, jnp.zeros((), jnp.float32))
