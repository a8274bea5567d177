"""Saliency: the first-order change of the loss when a weight is removed."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def saliency(w: jax.Array, *, grad: jax.Array) -> jax.Array:
    """|w * dL/dw|.

    Args:
        w: The weight.
        grad: Gradient of the loss, shape of `w`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.saliency(jnp.array([-2.0, 1.0]), grad=jnp.array([3.0, -1.0]))
        Array([6., 1.], dtype=float32)

    References: Mozer & Smolensky, Skeletonization, 1988; Molchanov et al., 2017, arXiv:1611.06440.
    """
    return jnp.abs(w * grad)
