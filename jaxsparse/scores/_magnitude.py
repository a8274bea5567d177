"""Magnitude: the baseline that is hard to beat."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def magnitude(w: jax.Array) -> jax.Array:
    """|w|.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.magnitude(jnp.array([-2.0, 1.0]))
        Array([2., 1.], dtype=float32)

    References: Han et al., Learning both weights and connections, 2015, arXiv:1506.02626.
    """
    return jnp.abs(w)
