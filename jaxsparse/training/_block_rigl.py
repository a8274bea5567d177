"""RigL on stored blocks: Evci et al., 2020, arXiv:1911.11134, without the dense gradient."""

from __future__ import annotations

from typing import Any

import jax

from jaxsparse.schedules import Schedule, When
from jaxsparse.training._move_blocks import move_blocks
from jaxsparse.training._probes import ProbeOf, sketch_probe
from jaxsparse.training._updater import MaskUpdater


def block_rigl(
    blocks: Any,
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule = 0.3,
    probe: ProbeOf = sketch_probe(),
) -> MaskUpdater:
    """Dynamic sparse training on stored blocks that grows where the gradient is large.

    At each update the blocks of smallest norm leave, `drop_fraction` of every leaf, and as many
    come into the same block columns: those of largest gradient norm since the last update. The
    norm of the gradient of blocks that are not stored is measured by probes, one number a block;
    neither a dense weight nor the dense gradient of all layers is ever kept.

    Args:
        blocks: Second result of `blockify`.
        key: Random key of the probes.
        when: Step -> whether to update, e.g. `every(100, stop=0.75 * steps)`.
        drop_fraction: Share of the stored blocks to move, 0 to 1: a number or a schedule.

        probe: How the norms are measured: `sketch_probe()`, a little at every step;
            `exact_probe()`, at the steps of updates alone; `candidate_probe(n)`, there and of n
            blocks a column that are not stored.

    Returns:
        A `MaskUpdater` for the parameters `add_probes(values, blocks)`; compute the loss with its
        `view`. Grown blocks start at zero.

    Raises:
        ValueError: If `drop_fraction` is a number outside [0, 1]; in `init`, if the parameters are
            not those that belong to the blocks.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> values, blocks = jsp.blockify([jnp.eye(8)], jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> params = jsp.add_probes(values, blocks)
        >>> updater = jsp.block_rigl(blocks, key=jax.random.key(0), when=jsp.every(1))
        >>> state = jsp.sparsify(optax.sgd(0.1), updater).init(params)
        >>> loss = lambda p: (jnp.ones((2, 8)) @ updater.view(p, state.updater)[0]).sum()
        >>> jax.grad(loss)(params)[0].probe.shape
        (4, 4)

    Cost: that of the probe; the probe and its moments, one entry a block; an update, two selections
    over blocks.

    Deviations: blocks for weights; the same number of blocks in every column; with `sketch_probe`
    the mean square of the gradient of all steps since the last update instead of one batch's.

    References: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134.
    """
    return move_blocks(blocks, key=key, when=when, drop_fraction=drop_fraction, probe=probe)
