"""Iterative hard thresholding: Blumensath & Davies, 2009; for networks Jin et al., 2016.

Skeleton of a pruning algorithm. Copy it to `jaxsparse/training/_<name>.py`; the numbers refer to
the list in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._choose import choose
from jaxsparse.plans import Plan
from jaxsparse.schedules import When
from jaxsparse.training._updater import MaskUpdater, run_when

Tree = Any


class IHTState(NamedTuple):  # 1: arrays only; `masks` is what the model sees
    """State of `iht`: steps taken (int32) and masks."""

    count: jax.Array
    masks: Tree


def iht(distribution: Callable[[Tree], Plan], *, when: When, step_size: float = 0.1) -> MaskUpdater:
    """Keep the weights that are largest after a gradient step on all of them.

    At an update each group keeps its top units of |w - step_size * g|, where g is the dense
    gradient; w is zero off the masks.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.9)`.
        when: Step -> whether to choose masks anew, e.g. `every(10)`.
        step_size: Length of the gradient step, above 0.

    Returns:
        A `MaskUpdater`; weights that come in start at zero.

    Raises:
        ValueError: If step_size is not above 0.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> tx = jsp.sparsify(optax.sgd(0.1), iht(jsp.uniform(0.5), when=jsp.every(1)))
        >>> params = {"w": jnp.array([[4.0, 3.0, 0.1, 0.0]])}
        >>> _, state = tx.update({"w": jnp.array([[0.0, 30.0, 0.0, 9.0]])}, tx.init(params), params)
        >>> jsp.masks(state)["w"]
        Array([[ True, False, False,  True]], dtype=bool)

    Cost: masks of 1 byte a weight; a selection at each update.

    Deviations: the weights take the step of the inner optimizer, not `step_size`.

    References: Blumensath & Davies, 2009, arXiv:0805.0510; Jin et al., 2016, arXiv:1607.05423.
    """
    if not step_size > 0:  # 2: errors name the argument, the rule and the value
        raise ValueError(f"step_size is the length of the gradient step, > 0; got {step_size}.")

    def init(params: Tree) -> IHTState:
        weights = jax.tree.leaves(params)
        masks = choose(distribution, params, lambda i: jnp.abs(weights[i]))
        return IHTState(jnp.zeros((), jnp.int32), masks)

    def update(
        state: IHTState, params: Tree, grads: Tree, *, finite: jax.Array, **extra: Any
    ) -> IHTState:
        del extra
        weights, slopes = jax.tree.leaves(params), jax.tree.leaves(grads)

        def score_of(i: int) -> jax.Array:  # 3: of leaf i, larger means keep
            w = jnp.where(jax.tree.leaves(state.masks)[i], weights[i], 0)
            return jnp.abs(w - step_size * slopes[i].astype(w.dtype))

        def select(masks: Tree) -> Tree:
            del masks
            return choose(distribution, params, score_of)

        due = when(state.count) & finite  # 4: nothing moves where the gradient is not finite
        masks = run_when(due, select, state.masks)
        return IHTState(state.count + finite.astype(jnp.int32), masks)

    return MaskUpdater(init, update)
