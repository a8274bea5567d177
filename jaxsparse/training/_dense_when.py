"""Dense phases of straight-through training: a dense start, a dense tail, or turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.schedules import When
from jaxsparse.training._updater import MaskUpdater

Tree = Any


class DenseWhenState(NamedTuple):
    """State of `dense_when`: steps taken (int32), masks, and the rest of the wrapped state."""

    count: jax.Array
    masks: Tree
    rest: Any
    dense_weights = True


def dense_when(updater: MaskUpdater, when: When) -> MaskUpdater:
    """Train densely at some steps: there the view is the weights, and nothing is regularized.

    Hu et al. end 2:4 pre-training with one sixth of dense steps, `lambda step: step >= stop`; a
    dense start is `lambda step: step < start`.

    Args:
        updater: An updater whose weights stay dense: `ste`, `sr_ste`, `s_ste`, `mask_decay`.
        when: Step -> whether it is dense.

    Returns:
        A `MaskUpdater`. Its masks go on following the weights, so that flip rates of dense training
        can be measured.

    Raises:
        ValueError: In `init`, for an updater whose weights are zero off the masks: there are no
            weights to be dense with.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> updater = jsp.dense_when(jsp.ste(jsp.uniform(0.5)), lambda step: step >= 2)
        >>> params = {"w": jnp.array([[4.0, 2.0]])}
        >>> state = updater.init(params)
        >>> for _ in range(2):
        ...     state = updater.update(state, params, params, finite=jnp.array(True))
        >>> updater.view(params, state)["w"]
        Array([[4., 2.]], dtype=float32)

    Cost: nothing beyond the updater's own, and a select in each view.

    References: Hu et al., Accelerating transformer pre-training with 2:4 sparsity, 2024,
    arXiv:2404.01847 (dense fine-tuning at the end, checked against the authors' code).
    """

    def wrapped(count: jax.Array, state: Any) -> DenseWhenState:
        return DenseWhenState(count, state.masks, state._replace(masks=()))

    def inside(state: DenseWhenState) -> Any:
        return state.rest._replace(masks=state.masks)

    def init(params: Tree) -> DenseWhenState:
        state = updater.init(params)
        if not getattr(state, "dense_weights", False):
            raise ValueError(
                f"dense_when needs an updater whose weights stay dense (ste, sr_ste, s_ste, "
                f"mask_decay); got one with a {type(state).__name__}."
            )
        return wrapped(jnp.zeros((), jnp.int32), state)

    def update(
        state: DenseWhenState, params: Tree, grads: Tree, *, finite: jax.Array, **extra: Any
    ) -> DenseWhenState:
        new = updater.update(inside(state), params, grads, finite=finite, **extra)
        return wrapped(state.count + finite.astype(jnp.int32), new)

    def either(state: DenseWhenState, dense: Tree, sparse: Tree) -> Tree:
        here = when(state.count)
        return jax.tree.map(
            lambda a, b: a if a is b else jnp.where(here, a, b.astype(a.dtype)), dense, sparse
        )

    def view(params: Tree, state: DenseWhenState) -> Tree:
        return either(state, params, updater.view(params, inside(state)))

    def wrap(hook: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
        def regularize(params: Tree, state: DenseWhenState, grads: Tree, updates: Tree) -> Any:
            new = hook(params, inside(state), grads, updates)
            if updates is None:
                return either(state, grads, new[0]), None
            return grads, either(state, updates, new[1])

        return regularize

    def kept(old: DenseWhenState, new: DenseWhenState) -> Tree:
        return updater.kept(inside(old), inside(new))

    hook = updater.regularize
    hook = hook if hook is None else wrap(hook)
    return MaskUpdater(init, update, view, kept, hook, updater.after_step)
