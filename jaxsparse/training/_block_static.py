"""Training on stored blocks that stay where they are."""

from __future__ import annotations

from typing import Any

import jax

from jaxsparse.schedules import once
from jaxsparse.training._move_blocks import move_blocks
from jaxsparse.training._static import keep_state
from jaxsparse.training._updater import MaskUpdater


def block_static(blocks: Any) -> MaskUpdater:
    """Train stored blocks where they are: layers cost what their blocks cost.

    Compute the loss with `view(params, state.updater)`, which has a `BlockSparse` for each stored
    leaf; parameters, gradients and optimizer state are of the size of the stored blocks.

    Args:
        blocks: Second result of `blockify`.

    Returns:
        A `MaskUpdater`.

    Raises:
        ValueError: In `init`, if the parameters are not those that belong to the blocks.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> values, blocks = jsp.blockify([jnp.eye(4)], jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> updater = jsp.block_static(blocks)
        >>> state = jsp.sparsify(optax.adam(1e-3), updater).init(values)
        >>> updater.view(values, state.updater)[0].shape
        (4, 4)

    Cost: nothing per step beyond the blocks.
    """
    key = jax.random.key(0)  # nothing moves, so nothing is drawn
    updater = move_blocks(blocks, key=key, when=once(0), drop_fraction=0.0, probe=None)
    return updater._replace(update=keep_state)
