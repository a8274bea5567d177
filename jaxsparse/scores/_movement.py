"""Movement: keep weights that move away from zero."""

from __future__ import annotations

import jax


def movement(w: jax.Array, *, grad: jax.Array) -> jax.Array:
    """-w * dL/dw: positive where descent moves the weight away from zero.

    Args:
        w: The weight.
        grad: Gradient of the loss, shape of `w`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.movement(jnp.array([2.0, 2.0]), grad=jnp.array([-1.0, 1.0]))
        Array([ 2., -2.], dtype=float32)

    Deviations: the score of one batch; the paper sums it over training steps.

    References: Sanh et al., Movement pruning, 2020, arXiv:2005.07683.
    """
    return -w * grad
