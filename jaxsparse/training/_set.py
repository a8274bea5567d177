"""SET: Mocanu et al., Scalable training of artificial neural networks, 2018, arXiv:1707.04780."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxsparse import _tree
from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._prune_and_grow import prune_and_grow
from jaxsparse.training._updater import MaskUpdater


def set_(
    distribution: Callable[[Any], Plan],
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule = 0.3,
) -> MaskUpdater:
    """Dynamic sparse training that grows at random; needs no dense gradient.

    At each update every leaf drops its smallest `drop_fraction` of kept units and grows as many at
    random; density never changes.

    Args:
        distribution: Parameters -> `Plan`; the paper uses Erdos-Renyi densities, `erk`.
        key: Random key of the first masks and of growth.
        when: Step -> whether to update, e.g. `every(100)`.
        drop_fraction: Share of the kept units to move, 0 to 1: a number or a schedule.

    Returns:
        A `MaskUpdater`; grown weights start at zero.

    Raises:
        ValueError: If `drop_fraction` is a number outside [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.set_(jsp.erk(0.5), key=jax.random.key(0), when=jsp.every(1))
        >>> tx, params = jsp.sparsify(optax.adam(1e-3), updater), {"w": jnp.ones((8, 8))}
        >>> state = tx.init(params)
        >>> _, new = tx.update({"w": jnp.ones((8, 8))}, state, params)
        >>> int(jsp.masks(new)["w"].sum()), bool(jsp.churn(jsp.masks(state), jsp.masks(new)) > 0)
        (32, True)

    Cost: masks of 1 byte a weight; two selections and random numbers at each update.

    Deviations: drops by |w|; the paper drops the smallest positive and the largest negative
    weights. Grown weights start at zero, the paper's at small random values.

    References: Mocanu et al., 2018, arXiv:1707.04780.
    """
    first, growth = jax.random.split(key)

    def grow(path: str, w: jax.Array, grad: jax.Array, step: jax.Array) -> jax.Array:
        del grad
        return _tree.uniform_noise(jax.random.fold_in(_tree.leaf_key(growth, path), step), w)

    return prune_and_grow(
        distribution, key=first, when=when, drop_fraction=drop_fraction, grow=grow
    )
