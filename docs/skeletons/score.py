"""Skeleton of a score: a function of one leaf and of evidence about it; larger means keep.

Scores of the library stand in `jaxsparse/scores/_<name>.py`; your own can stand anywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def signal_to_noise(w: jax.Array, *, variance: jax.Array) -> jax.Array:
    """|w| / sigma: weights that are large beside their uncertainty.

    Args:
        w: The weight, or the mean of its posterior.
        variance: Its variance, shape of `w`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params, variance = {"w": jnp.array([[2.0, 1.0]])}, {"w": jnp.array([[16.0, 1.0]])}
        >>> _, masks = jsp.prune(params, jsp.uniform(0.5), signal_to_noise, variance=variance)
        >>> masks["w"]
        Array([[False,  True]], dtype=bool)

    References: Graves, 2011; Blundell et al., Weight uncertainty in neural networks, 2015,
    arXiv:1505.05424.
    """
    return jnp.abs(w) * jax.lax.rsqrt(variance)
