"""Flip rates: how fast masks move, and the decay that slows them to a share of dense training.

Hu et al., Accelerating transformer pre-training with 2:4 sparsity, 2024, arXiv:2404.01847.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._masks import churn
from jaxsparse.training._updater import MaskUpdater

Tree = Any


class FlipMeterState(NamedTuple):
    """State of `flip_meter`.

    Attributes:
        masks: Masks of the updater.
        rest: The rest of its state.
        rate: Share of the entries whose mask flipped at the last step, float32.
        total: Sum of the rates since the start, float32.
    """

    masks: Tree
    rest: Any
    rate: jax.Array
    total: jax.Array

    @property
    def dense_weights(self) -> bool:
        """Whether the weights of the updater stay dense."""
        return getattr(self.rest, "dense_weights", False)


def flip_meter(updater: MaskUpdater) -> MaskUpdater:
    """Any updater, with the flip rate of its masks in the state: |m(t) - m(t-1)|_1 / entries.

    Args:
        updater: The updater; nothing of what it does changes.

    Returns:
        A `MaskUpdater`; read `state.updater.rate` and `state.updater.total` of the optimizer state.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.flip_meter(jsp.ste(jsp.uniform(0.5)))
        >>> tx, params = jsp.sparsify(optax.sgd(1.0), updater), {"w": jnp.array([[4.0, 1.0, 2, 3]])}
        >>> _, state = tx.update({"w": jnp.array([[0.0, 0, -2.0, 0]])}, tx.init(params), params)
        >>> float(state.updater.rate)
        0.5

    Cost: a pass over the masks in each step.

    References: Hu et al., 2024, arXiv:2404.01847; the number of flips is the SAD of Zhou et al.,
    2021, arXiv:2102.04010.
    """

    def inside(state: FlipMeterState) -> Any:
        return state.rest._replace(masks=state.masks)

    def init(params: Tree) -> FlipMeterState:
        state = updater.init(params)
        # Two arrays: one that stands twice in a state cannot be donated.
        rate, total = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        return FlipMeterState(state.masks, state._replace(masks=()), rate, total)

    def update(
        state: FlipMeterState, params: Tree, grads: Tree, *, finite: jax.Array, **extra: Any
    ) -> FlipMeterState:
        new = updater.update(inside(state), params, grads, finite=finite, **extra)
        rate = jnp.where(finite, churn(state.masks, new.masks), state.rate)
        total = state.total + jnp.where(finite, rate, 0)
        return FlipMeterState(new.masks, new._replace(masks=()), rate, total)

    def view(params: Tree, state: FlipMeterState) -> Tree:
        return updater.view(params, inside(state))

    def kept(old: FlipMeterState, new: FlipMeterState) -> Tree:
        return updater.kept(inside(old), inside(new))

    def wrap(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, state, *trees: hook(params, inside(state), *trees)

    hook = updater.regularize
    hook = hook if hook is None else wrap(hook)
    return MaskUpdater(init, update, view, kept, hook, updater.after_step)


def choose_decay(
    decays: jax.Array,
    rates: jax.Array,
    dense_rate: jax.Array | float,
    *,
    low: float = 0.6,
    high: float = 0.95,
) -> jax.Array:
    """The decay whose flip rate is a healthy share of that of dense training.

    Run the warm-up of `flip_meter(sr_ste(..., decay=d))` for some d, side by side with `jax.vmap`,
    and of `flip_meter(dense_when(ste(...), always))` once. Pull too weak lets masks flap about
    (share above 1), too strong freezes them.

    Args:
        decays: `[C]`, what was tried.
        rates: `[C]`, the flip rates at the end of its warm-up.
        dense_rate: Flip rate of dense training at that step.
        low: Least share of `dense_rate`.
        high: Largest share.

    Returns:
        The decay, of those with a share in [low, high], whose share is nearest to the middle; of
        equal ones the first. NaN if there is none: try others in between.

    Raises:
        ValueError: Unless 0 <= low <= high and the shapes agree.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> decays, rates = jnp.array([1e-5, 1e-4, 1e-3]), jnp.array([0.040, 0.024, 0.004])
        >>> float(jsp.choose_decay(decays, rates, 0.03)) == float(jnp.float32(1e-4))
        True

    Deviations: the paper gives the range of the share and a grid; which one of several feasible
    decays to take is not said, and the middle is ours. In its published code the decay is a number
    set by hand.

    References: Hu et al., 2024, arXiv:2404.01847.
    """
    decays, rates = jnp.asarray(decays, jnp.float32), jnp.asarray(rates, jnp.float32)
    if not 0 <= low <= high or decays.shape != rates.shape or decays.ndim != 1:
        raise ValueError(
            f"choose_decay needs 0 <= low <= high and as many rates as decays; got low={low}, "
            f"high={high}, shapes {decays.shape} and {rates.shape}."
        )
    share = rates / jnp.asarray(dense_rate, jnp.float32)
    distance = jnp.where(
        (share >= low) & (share <= high), jnp.abs(share - (low + high) / 2), jnp.inf
    )
    best = jnp.argmin(distance)
    return jnp.where(jnp.isfinite(distance[best]), decays[best], jnp.nan)
