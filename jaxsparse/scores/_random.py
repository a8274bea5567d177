"""Random: the null baseline of every table."""

from __future__ import annotations

import jax

from jaxsparse import _tree


def random(w: jax.Array, *, key: jax.Array) -> jax.Array:
    """Uniform noise in [0, 1), float32.

    Args:
        w: The weight; only its shape and sharding are used.
        key: Random key. `prune` and the updaters derive one for each leaf from its path.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.random(jnp.zeros((2, 3)), key=jax.random.key(0)).shape
        (2, 3)

    References: Liu et al., The unreasonable effectiveness of random pruning, 2022,
    arXiv:2202.02643.
    """
    return _tree.uniform_noise(key, w)
