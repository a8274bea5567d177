"""SNIP: connection sensitivity at initialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def snip(w: jax.Array, *, grad: jax.Array) -> jax.Array:
    """|w * dL/dw|, the sensitivity of the loss to removing each connection.

    Meant for `prune(params, global_(s), snip, grad=grads)` before training.

    Args:
        w: The weight at initialisation.
        grad: Gradient of the loss over one or more batches, shape of `w`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.snip(jnp.array([-2.0, 1.0]), grad=jnp.array([3.0, -1.0]))
        Array([6., 1.], dtype=float32)

    Deviations: the paper divides by the sum over all connections, which changes no ranking.

    References: Lee et al., SNIP, 2019, arXiv:1810.02340.
    """
    return jnp.abs(w * grad)
