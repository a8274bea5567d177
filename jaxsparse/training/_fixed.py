"""Given masks: prune by any method, then fine-tune."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse._masks import check_fit, is_hidden
from jaxsparse.training._static import StaticState, keep_state
from jaxsparse.training._updater import MaskUpdater

Tree = Any


def fixed(masks: Tree) -> MaskUpdater:
    """Masks that are given and never moved.

    Args:
        masks: Mask tree of bools in the structure of the parameters, e.g. from `prune`.

    Returns:
        A `MaskUpdater`.

    Raises:
        ValueError: In `init`, if a mask is not bool or does not fit its weight; names the leaf.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> params, masks = jsp.prune({"w": jnp.array([[3.0, 1.0]])}, jsp.uniform(0.5))
        >>> state = jsp.sparsify(optax.adam(1e-3), jsp.fixed(masks)).init(params)
        >>> jsp.masks(state)["w"]
        Array([[ True, False]], dtype=bool)

    Cost: nothing per step beyond the masks.
    """

    def init(params: Tree) -> StaticState:
        if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder
            return StaticState(params)
        try:
            shown = jax.tree.map(
                lambda w, m: w if is_hidden(w) else m, params, masks, is_leaf=is_hidden
            )
        except ValueError:
            shown = _tree.in_containers_of(params, masks, "masks")
        check_fit(params, shown)
        # Copies, so that a donated state never deletes the arrays of the caller.
        return StaticState(jax.tree.map(lambda m: jnp.array(m, bool), shown))

    return MaskUpdater(init, keep_state)
