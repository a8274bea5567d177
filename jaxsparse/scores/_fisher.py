"""Fisher: the second-order change of the loss, with a diagonal curvature."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def fisher(w: jax.Array, *, fisher: jax.Array) -> jax.Array:
    """w^2 * F / 2, the loss increase of removing a weight at a minimum.

    Args:
        w: The weight.
        fisher: Diagonal of the Fisher information, e.g. the mean of squared gradients of single
            examples, shape of `w`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.fisher(jnp.array([2.0, 1.0]), fisher=jnp.array([1.0, 2.0]))
        Array([2., 1.], dtype=float32)

    References: LeCun et al., Optimal brain damage, 1989; Theis et al., 2018, arXiv:1801.05787.
    """
    return jnp.square(w) * fisher / 2
