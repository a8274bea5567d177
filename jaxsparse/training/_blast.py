"""BLaST: Okanovic et al., 2025, arXiv:2507.03117; Liu et al., GraNet, 2021, arXiv:2106.10404."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.patterns import Pattern, mask_of_count
from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._gradual import on_schedule
from jaxsparse.training._prune_and_grow import fraction_schedule
from jaxsparse.training._updater import MaskUpdater


def blast(
    distribution: Callable[[Any], Plan],
    *,
    schedule: Schedule,
    when: When,
    drop_fraction: float | Schedule = 0.3,
) -> MaskUpdater:
    """Gradual sparsification that also grows: fewer units at each update, some of them new.

    At an update at step t each leaf keeps k units, as many as `schedule(t) * final` leaves over:
    the (1 - f) k kept ones of largest weight norm and, of all others, those of largest gradient
    norm. Made for blocks; with other patterns it is GraNet. Weights are dense arrays under masks;
    for stored blocks see `block_gradual`.

    Args:
        distribution: Parameters -> `Plan` with the final sparsities, e.g.
            `uniform(0.9, Block((64, 64)))`.
        schedule: Step -> share of the final sparsity, 0 to 1; the paper's is `cubic(begin, end)`.
        when: Step -> whether to update, e.g. `every(100, stop=steps)`; the step at which the
            schedule first reaches 1 always is one.
        drop_fraction: Share f of the kept units that the gradient chooses, 0 to 1: a number or a
            schedule. With 0 this is `gradual`.

    Returns:
        A `MaskUpdater`; all masks are True until the first update, grown weights start at zero.

    Raises:
        ValueError: If `drop_fraction` is a number outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> plan = jsp.uniform(0.5, jsp.Block((1, 2)))
        >>> updater = jsp.blast(plan, schedule=jsp.constant(), when=jsp.every(1), drop_fraction=0.5)
        >>> tx, params = jsp.sparsify(optax.sgd(0.1), updater), {"w": jnp.array([[5, 4, 0, 0.1]])}
        >>> grads = {"w": jnp.array([[0, 0.1, 0.3, 0.3]])}
        >>> jsp.masks(tx.update(grads, tx.init(params), params)[1])["w"]
        Array([[ True,  True, False, False]], dtype=bool)

    Cost: masks of 1 byte a weight; two selections at each update.

    Deviations: how many blocks the gradient chooses is a share of the kept ones, as in RigL and
    GraNet; the public summaries of the paper leave it open.

    References: Okanovic et al., BLaST, 2025, arXiv:2507.03117; Liu et al., Sparse Training via
    Boosting Pruning Plasticity with Neuroregeneration, 2021, arXiv:2106.10404.
    """
    fraction_at = fraction_schedule(drop_fraction, "kept weights")

    def move(
        pattern: Pattern, mask: jax.Array, scores: jax.Array, grad: jax.Array, count: Any, step: Any
    ) -> jax.Array:
        stay = count - jnp.round(fraction_at(step) * count).astype(jnp.int32)
        stays = mask & mask_of_count(pattern, jnp.where(mask, scores, -jnp.inf), stay)
        return mask_of_count(pattern, jnp.where(stays, jnp.inf, _squares(grad)), count)

    return on_schedule(distribution, schedule=schedule, when=when, score=_squares, move=move)


def _squares(w: jax.Array) -> jax.Array:
    """Their sum over a unit is the square of its norm."""
    return jnp.square(w.astype(jnp.float32))
