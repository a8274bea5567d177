"""Straight-through estimation: a sparse forward pass over dense weights.

Bengio et al., 2013, arXiv:1308.3432; for N:M masks Zhou et al., 2021, arXiv:2102.04010.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse._choose import choose
from jaxsparse._masks import unpack_masks
from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.scores._evidence import scorer
from jaxsparse.scores._magnitude import magnitude
from jaxsparse.training._updater import MaskUpdater, run_when

Tree = Any


class STEState(NamedTuple):
    """State of `ste` and `sr_ste`: steps taken (int32) and masks of the weights."""

    count: jax.Array
    masks: Tree
    dense_weights = True


@jax.custom_jvp
def straight_through(w: jax.Array, mask: jax.Array) -> jax.Array:
    """Masked weights whose gradient is that of the dense ones.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> mask = jnp.array([True, False])
        >>> jax.grad(lambda w: jsp.straight_through(w, mask).sum())(jnp.array([3.0, 1.0]))
        Array([1., 1.], dtype=float32)
    """
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@straight_through.defjvp
def _straight_through_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return straight_through(*primals), tangents[0]


def ste(
    distribution: Callable[[Tree], Plan],
    *,
    when: When | None = None,
    schedule: Schedule | None = None,
) -> MaskUpdater:
    """Forward with the largest weights, backward to all of them.

    The loss is computed with `view(params, state.updater)`: w where the mask keeps it, else 0; the
    gradient passes straight through to every weight. Masks are chosen from the weights after a
    step, and serve the next view.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.5, NM(2, 4))`.
        when: Step -> whether its view gets fresh masks, e.g. `every(40)`; None is every step.
        schedule: Step -> share of the final sparsity, 0 to 1: N:M leaves keep round(density * m) of
            each group on the way. None is the final sparsity from the start. With `halving(1, 16,
            begin, end)` this is structure decay: 15:16, 8:16, 4:16, 2:16, 1:16.

    Returns:
        A `MaskUpdater`; the weights stay dense. At the end take `view(params, state.updater)`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.ste(jsp.uniform(0.5, jsp.NM(2, 4, axis=-1)))
        >>> params = {"w": jnp.array([[1.0, 4.0, 3.0, 2.0]])}
        >>> tx = jsp.sparsify(optax.sgd(0.1), updater)
        >>> updater.view(params, tx.init(params).updater)["w"]
        Array([[0., 4., 3., 0.]], dtype=float32)

    Cost: masks of 1 byte a weight; a selection at every step, or when due.

    Deviations: masks are of the step's own result; if something outside `sparsify` rescales updates
    they are those of the weights it would have given.

    References: Bengio et al., 2013, arXiv:1308.3432; Zhou et al., 2021, arXiv:2102.04010; structure
    decay: Bambhaniya et al., Progressive gradient flow, 2024, arXiv:2402.04744.
    """

    def masks_at(step: jax.Array, params: Tree) -> Tree:
        share = 1.0 if schedule is None else jnp.asarray(schedule(step), jnp.float32)
        return choose(distribution, params, scorer(magnitude, params, {}), share)

    def init(params: Tree) -> STEState:
        step = jnp.zeros((), jnp.int32)
        return STEState(step, masks_at(step, params))

    def update(
        state: STEState, params: Tree, grads: Tree, *, finite: jax.Array, **extra: Any
    ) -> STEState:
        del grads, extra
        step = state.count + finite.astype(jnp.int32)
        if when is None:  # where a gradient is not finite the weights have not moved
            return STEState(step, masks_at(step, params))
        due = when(step) & finite
        return STEState(step, run_when(due, lambda _: masks_at(step, params), state.masks))

    def view(params: Tree, state: STEState) -> Tree:
        return view_leaves(params, state.masks, straight_through)

    return MaskUpdater(init, update, view, keep_all, after_step=True)


def view_leaves(
    params: Tree, masks: Tree, show: Callable[[jax.Array, jax.Array], jax.Array]
) -> Tree:
    """`show(w, mask)` of every leaf that has a mask, in the containers of the parameters."""

    def of_leaf(w: jax.Array, mask: jax.Array) -> jax.Array:
        return show(w, mask) if jnp.ndim(mask) else w

    masks = _tree.in_containers_of(params, unpack_masks(masks), "the masks of this state")
    return jax.tree.map(of_leaf, params, masks)


def keep_all(old: Any, new: Any) -> Tree:
    """`kept` of updaters with dense weights: every value and moment survives."""
    del new
    return jax.tree.map(lambda _: jnp.array(True), old.masks)
