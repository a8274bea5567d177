"""BLaST on stored blocks: Okanovic et al., 2025, arXiv:2507.03117."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.patterns import Block, kept_units
from jaxsparse.plans import LeafPlan, Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._gradual import or_when_reached
from jaxsparse.training._move_blocks import move_blocks
from jaxsparse.training._probes import ProbeOf, sketch_probe
from jaxsparse.training._stored import is_stored, is_topology, map_stored, values_of
from jaxsparse.training._updater import MaskUpdater
from pallas_kernels import Topology

Tree = Any


def block_gradual(
    blocks: Any,
    distribution: Callable[[Tree], Plan],
    *,
    key: jax.Array,
    schedule: Schedule,
    when: When,
    drop_fraction: float | Schedule = 0.3,
    probe: ProbeOf = sketch_probe(),
) -> MaskUpdater:
    """Gradual sparsification of stored blocks that also grows: `blast`, without a dense weight.

    At an update at step t every block column of a leaf holds k blocks, as many as
    `schedule(t) * final` leaves over. Those of smallest norm are given up; of the others,
    `drop_fraction` move to where the gradient norm is largest, as in `block_rigl`.

    Memory is that of the slots that `blockify` made, whose number is a shape: a slot that is given
    up holds zeros, in values and moments alike. `compact` makes the arrays as small as what is left
    needs, on the host, at the price of a compilation.

    Args:
        blocks: Second result of `blockify(params, distribution, density=...)`, where `density` says
            how dense to begin.
        distribution: What `blockify` was given: parameters -> `Plan` with the final sparsities.
        key: Random key of the probes.
        schedule: Step -> share of the final sparsity, 0 to 1, e.g. `cubic(begin, end)`. While it
            asks for more blocks than are stored, none is given up.
        when: Step -> whether to update, e.g. `every(100, stop=steps)`; the step at which the
            schedule first reaches 1 always is one.
        drop_fraction: Share of the stored blocks to move, 0 to 1: a number or a schedule.
        probe: As in `block_rigl`.

    Returns:
        A `MaskUpdater` for the parameters `add_probes(values, blocks)`; compute the loss with its
        `view`. Grown blocks start at zero.

    Raises:
        ValueError: If `drop_fraction` is a number outside [0, 1]; in `init`, if the parameters, the
            blocks and the plan do not belong together.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> plan = jsp.uniform(0.75, jsp.Block((2, 2)))
        >>> values, blocks = jsp.blockify([jnp.ones((8, 8))], plan, density=1.0)
        >>> params, at = jsp.add_probes(values, blocks), {"when": jsp.once(0)}
        >>> at |= {"key": jax.random.key(0), "schedule": jsp.constant()}
        >>> tx = jsp.sparsify(optax.sgd(0.1), jsp.block_gradual(blocks, plan, **at))
        >>> state = tx.update(params, tx.init(params), params)[1]
        >>> blocks[0].count.item(), state.updater.blocks[0].count.item()
        (16, 4)

    Cost: as `block_rigl` with as many slots. What is given up still takes its time in a product on
    a CPU, until `compact`.

    Deviations: as many blocks in every column of a leaf. How many blocks the gradient chooses is a
    share of the stored ones; the public summaries of the paper leave it open.

    References: Okanovic et al., BLaST, 2025, arXiv:2507.03117.
    """

    def counts(params: Tree, blocks: Tree, step: jax.Array) -> list[Any]:
        share, plan = jnp.asarray(schedule(step), jnp.float32), _plan(distribution, params, blocks)
        topologies = jax.tree.leaves(blocks, is_leaf=is_topology)
        return [
            _count(share, leaf, topology) if is_topology(topology) else None
            for leaf, topology in zip(plan.leaves, topologies, strict=True)
        ]

    return move_blocks(
        blocks,
        key=key,
        when=or_when_reached(when, schedule),
        drop_fraction=drop_fraction,
        probe=probe,
        counts=counts,
    )


def _count(share: jax.Array, leaf: LeafPlan, topology: Topology) -> jax.Array:
    """Blocks of a column at `share` of the final sparsity: int32, at least 1, at most W."""
    rows = topology.grid[0]
    on_the_way = kept_units(1 - share * leaf.sparsity, rows)
    count = jnp.where(share >= 1, kept_units(leaf.density, rows), on_the_way)
    return jnp.clip(count, 1, topology.fan_in).astype(jnp.int32)


def _plan(distribution: Callable[[Tree], Plan], params: Tree, blocks: Tree) -> Plan:
    """The plan of the dense weights that the stored ones stand for; raises if it does not fit."""

    def dense(leaf: Any, topology: Any) -> Any:
        if not is_topology(topology):
            return leaf
        values, (r, c) = values_of(leaf), topology.grid
        *lead, _, bk, bn = values.shape
        return jax.ShapeDtypeStruct((*lead, r * bk, c * bn), values.dtype)

    plan = distribution(map_stored(dense, params, blocks))
    leaves = jax.tree.leaves(params, is_leaf=is_stored)
    topologies = jax.tree.leaves(blocks, is_leaf=is_topology)
    for path, leaf, values, topology in zip(
        plan.paths, plan.leaves, leaves, topologies, strict=True
    ):
        *_, bk, bn = 1, 1, *values_of(values).shape
        stored = Block((bk, bn)) if is_topology(topology) else None
        if (leaf.pattern if leaf.sparsity else None) != stored:
            what = f"{leaf.pattern}, sparsity {leaf.sparsity}" if leaf.sparsity else "dense"
            raise ValueError(
                f"{path} is planned as {what}, but it is stored as {stored or 'a dense leaf'}. "
                "Give block_gradual the distribution that blockify was given."
            )
        if stored and topology.fan_in < (final := int(kept_units(leaf.density, topology.grid[0]))):
            raise ValueError(
                f"{path} stores {topology.fan_in} blocks of each column, fewer than the {final} "
                "that are planned in the end. Give blockify a larger density=."
            )
    return plan
