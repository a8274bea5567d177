"""SET on stored blocks: Mocanu et al., 2018, arXiv:1707.04780, with blocks for connections."""

from __future__ import annotations

from typing import Any

import jax

from jaxsparse.schedules import Schedule, When
from jaxsparse.training._move_blocks import move_blocks
from jaxsparse.training._updater import MaskUpdater


def block_set(
    blocks: Any,
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule = 0.3,
) -> MaskUpdater:
    """Dynamic sparse training on stored blocks that grows at random; never makes a dense weight.

    At each update the blocks of smallest norm leave, `drop_fraction` of every leaf, and as many
    random ones come into the same block columns.

    Args:
        blocks: Second result of `blockify`.
        key: Random key of growth.
        when: Step -> whether to update, e.g. `every(100)`.
        drop_fraction: Share of the stored blocks to move, 0 to 1: a number or a schedule.

    Returns:
        A `MaskUpdater`; compute the loss with its `view`. Grown blocks start at zero.

    Raises:
        ValueError: If `drop_fraction` is a number outside [0, 1]; in `init`, if the parameters are
            not those that belong to the blocks.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> values, blocks = jsp.blockify([jnp.eye(8)], jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> updater = jsp.block_set(blocks, key=jax.random.key(0), when=jsp.every(1))
        >>> tx = jsp.sparsify(optax.sgd(0.1), updater)
        >>> _, state = tx.update([jnp.ones((8, 2, 2))], tx.init(values), values)
        >>> int((state.updater.blocks[0].rows != blocks[0].rows).sum()) <= 2
        True

    Cost: per update, a pass over the values and sorts of as many integers as there are slots.

    References: Mocanu et al., 2018, arXiv:1707.04780.
    """
    return move_blocks(blocks, key=key, when=when, drop_fraction=drop_fraction, probe=None)
