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
from jaxsparse.scores._evidence import scorer
from jaxsparse.scores._magnitude import magnitude
from jaxsparse.training._updater import MaskUpdater

Tree = Any


class STEState(NamedTuple):
    """State of `ste` and `sr_ste`: masks of the current weights."""

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


def ste(distribution: Callable[[Tree], Plan]) -> MaskUpdater:
    """Forward with the largest weights, backward to all of them.

    The loss is computed with `view(params, state.updater)`: w where the mask of the current weights
    keeps it, else 0; the gradient passes straight through to every weight. Masks are chosen once a
    step, from the weights after it, and serve the next view.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.5, NM(2, 4))`.

    Returns:
        A `MaskUpdater`; the weights stay dense. At the end take `view(params, state.updater)`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.ste(jsp.uniform(0.5, jsp.NM(2, 4, axis=-1)))
        >>> params = {"w": jnp.array([[1.0, 4.0, 3.0, 2.0]])}
        >>> tx = jsp.sparsify(optax.sgd(0.1), updater)
        >>> updater.view(params, tx.init(params).updater)["w"]
        Array([[0., 4., 3., 0.]], dtype=float32)

    Cost: masks of 1 byte a weight; a selection at every step.

    Deviations: masks are of the step's own result; if something outside `sparsify` rescales updates
    they are those of the weights it would have given.

    References: Bengio et al., 2013, arXiv:1308.3432; Zhou et al., 2021, arXiv:2102.04010.
    """

    def masks_of(params: Tree) -> STEState:
        return STEState(choose(distribution, params, scorer(magnitude, params, {})))

    def update(state: STEState, params: Tree, grads: Tree, **extra: Any) -> STEState:
        del state, grads, extra  # where a gradient is not finite the weights have not moved
        return masks_of(params)

    def view(params: Tree, state: STEState) -> Tree:
        def of_leaf(w: jax.Array, mask: jax.Array) -> jax.Array:
            return straight_through(w, mask) if jnp.ndim(mask) else w

        masks = _tree.in_containers_of(params, unpack_masks(state.masks), "the masks of this state")
        return jax.tree.map(of_leaf, params, masks)

    def kept(old: STEState, new: STEState) -> Tree:
        del new
        return jax.tree.map(lambda _: jnp.array(True), old.masks)

    return MaskUpdater(masks_of, update, view, kept, after_step=True)
