"""Gradient: where the loss pulls hardest, kept or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gradient(w: jax.Array, *, grad: jax.Array) -> jax.Array:
    """|dL/dw|: what RigL grows by.

    Args:
        w: The weight; not used.
        grad: Gradient of the loss, shape of `w`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.gradient(jnp.zeros(2), grad=jnp.array([-2.0, 1.0]))
        Array([2., 1.], dtype=float32)

    References: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134.
    """
    del w
    return jnp.abs(grad)
