"""RigL: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._prune_and_grow import prune_and_grow
from jaxsparse.training._updater import MaskUpdater


def rigl(
    distribution: Callable[[Any], Plan],
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule = 0.3,
) -> MaskUpdater:
    """Dynamic sparse training that grows where the gradient is large.

    At each update every leaf drops its smallest `drop_fraction` of kept units and grows as many of
    largest |gradient|; density never changes: kept = top_{d(1-f)} |w| within m; m' = top_d (inf on
    kept, |g| elsewhere).

    Args:
        distribution: Parameters -> `Plan`; the paper uses `erk`.
        key: Random key of the first masks.
        when: Step -> whether to update, e.g. `every(100, stop=0.75 * steps)`.
        drop_fraction: Share of the kept units to move, 0 to 1: a number, or a schedule such as
            `optax.cosine_decay_schedule(0.3, steps)`, which is the paper's.

    Returns:
        A `MaskUpdater`; grown weights start at zero.

    Raises:
        ValueError: If `drop_fraction` is a number outside [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.rigl(jsp.erk(0.5), key=jax.random.key(0), when=jsp.every(1))
        >>> tx, params = jsp.sparsify(optax.adam(1e-3), updater), {"w": jnp.ones((8, 8))}
        >>> state = tx.init(params)
        >>> _, new = tx.update({"w": jnp.arange(64.0).reshape(8, 8)}, state, params)
        >>> int(jsp.masks(new)["w"].sum()), bool(jsp.churn(jsp.masks(state), jsp.masks(new)) > 0)
        (32, True)

    Cost: masks of 1 byte a weight; two selections at each update.

    Deviations: the step of a mask update also takes an optimizer step on the weights that stay; the
    authors' code does one or the other.

    References: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134.
    """

    def grow(path: str, w: jax.Array, grad: jax.Array, step: jax.Array) -> jax.Array:
        del path, w, step
        return jnp.abs(grad)

    return prune_and_grow(distribution, key=key, when=when, drop_fraction=drop_fraction, grow=grow)
