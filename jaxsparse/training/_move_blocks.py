"""The engine of training on stored blocks: which slot holds which block, and when that changes.

The parameters are the values `[..., S, bk, bn]`; topologies live in the state and `view` joins the
two. A slot that is given to another block is to `sparsify` a slot whose mask fell: its value
becomes zero and its moments are cleared. All block columns hold the same number of blocks, which
stays, or falls where a schedule says so; slots that are given up hold no block from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _tree, select
from jaxsparse.formats._block_sparse import BlockSparse
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._probes import ProbeOf
from jaxsparse.training._prune_and_grow import fraction_schedule
from jaxsparse.training._stored import (
    Stored,
    in_containers_of,
    is_stored,
    is_topology,
    map_stored,
    stored_paths,
    values_of,
)
from jaxsparse.training._updater import MaskUpdater, run_when
from pallas_kernels import Topology, plan

Tree = Any
Counts = Callable[[Tree, Tree, jax.Array], list[Any]]  # params, blocks, step -> blocks a column


class BlockState(NamedTuple):
    """State of the updaters of stored blocks.

    Attributes:
        count: Steps taken, int32.
        masks: `[..., S, 1, 1]`, True for slots in use; False for probes, which stay zero.
        blocks: `Topology` of each stored leaf, and True for the others.
        growth: Of each probed leaf the sum of the squares of what its probe has measured since the
            last update, float32 `[..., R, C]`; 0 for the others.
    """

    count: jax.Array
    masks: Tree
    blocks: Tree
    growth: Tree


def move_blocks(
    blocks: Tree,
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule,
    probe: ProbeOf | None,
    counts: Counts | None = None,
) -> MaskUpdater:
    """An updater that drops the blocks of smallest norm and grows others.

    Of the S slots of each slice round(drop * S) leave, wherever they stand, and as many blocks come
    into the same columns: of largest gradient where there are probes, else at random. A block that
    is dropped may come back in the same update; it then keeps its value and moments. A block of
    which no gradient was seen comes in after all others.

    Args:
        blocks: Second result of `blockify`.
        key: Random key of growth, or of the probes.
        when: Step -> whether to move.
        drop_fraction: Share of the slots to move, 0 to 1, or a schedule.
        probe: How gradients are measured; stored leaves then have probes.
        counts: If given, how many blocks a column of each leaf holds after an update; never more
            than before.
    """
    fraction_at = fraction_schedule(drop_fraction, "stored blocks")
    probed = probe is not None

    def init(params: Tree) -> BlockState:
        count = jnp.zeros((), jnp.int32)
        if not jax.tree.leaves(params):  # optax.tree.map_params asks which parts are like params
            return BlockState(count, params, count, count)
        placed = in_containers_of(params, blocks, probed)
        if counts is not None:
            counts(params, placed, count)  # raises where the plan does not fit
        masks = map_stored(_mask, params, placed)
        growth = map_stored(_no_growth, params, placed)
        # Copies, so that a donated state never deletes the arrays of the caller.
        return BlockState(count, masks, jax.tree.map(jnp.array, placed), growth)

    def update(
        state: BlockState, params: Tree, grads: Tree, *, finite: jax.Array, **extra: Any
    ) -> BlockState:
        del extra
        step = state.count
        due = when(step) & finite
        fraction = fraction_at(step)

        def gathered(growth: jax.Array, slope: Any) -> jax.Array:
            if not is_stored(slope):
                return growth
            return growth + jnp.where(finite, jnp.square(slope.probe.astype(jnp.float32)), 0)

        growth = jax.tree.map(gathered, state.growth, grads)
        leaves = jax.tree.leaves(params, is_leaf=is_stored)
        found, treedef = jax.tree.flatten(state.blocks, is_leaf=is_topology)
        scores = treedef.flatten_up_to(growth)
        hold = counts(params, state.blocks, step) if counts is not None else [None] * len(leaves)
        for i, (path, leaf) in enumerate(zip(stored_paths(params), leaves, strict=True)):
            if not is_topology(found[i]):
                continue

            def move(
                held: tuple[Topology, jax.Array], i: int = i, path: str = path, leaf: Any = leaf
            ) -> tuple[Topology, jax.Array]:
                topology, seen = held
                if probed:
                    unseen = jnp.where(topology.block_map, 0.0, -1.0)
                    unseen = _tree.with_type_of(unseen, jax.typeof(seen))
                    wanted = jnp.where(seen > 0, seen, unseen)
                else:
                    noise = jax.random.fold_in(_tree.leaf_key(key, path), step)
                    shape = (*topology.rows.shape[:-1], *topology.grid)
                    wanted = jax.random.uniform(noise, shape)
                given = topology, values_of(leaf), wanted, fraction, hold[i]
                # Slots are sorted and gathered, which explicit axes would have to be told about.
                return _tree.in_auto_mode_as(topology, move_slots, *given), jnp.zeros_like(seen)

            found[i], scores[i] = run_when(due, move, (found[i], scores[i]))
        placed = treedef.unflatten(found)
        return BlockState(
            step + finite.astype(jnp.int32),
            state.masks if counts is None else map_stored(_mask, params, placed),
            placed,
            treedef.unflatten(scores),
        )

    def view(params: Tree, state: BlockState) -> Tree:
        placed = in_containers_of(params, state.blocks, probed)
        paths, due = iter(stored_paths(params)), when(state.count)

        def of_leaf(leaf: Any, topology: Any) -> Any:
            path = next(paths)
            if not is_topology(topology):
                return leaf
            if probe is None:
                return BlockSparse(leaf, topology)
            noise = jax.random.fold_in(_tree.leaf_key(key, path), state.count)
            measuring = probe(leaf.probe, leaf.values, topology, noise, due)
            return BlockSparse(leaf.values, topology, measuring)

        return map_stored(of_leaf, params, placed)

    return MaskUpdater(init, update, view, kept)


def kept(old: BlockState, new: BlockState) -> Tree:
    """Slots that hold the same block before and after; never a probe."""

    def of_leaf(before: Any, after: Any, mask: Any) -> Any:
        if not is_topology(before):
            return mask
        same = ((before.rows == after.rows) & after.used)[..., None, None]
        return mask._replace(values=same) if is_stored(mask) else same

    return jax.tree.map(of_leaf, old.blocks, new.blocks, old.masks, is_leaf=is_topology)


def move_slots(
    topology: Topology,
    values: jax.Array,
    scores: jax.Array,
    fraction: jax.Array,
    count: jax.Array | int | None = None,
) -> Topology:
    """The topology after one drop and grow.

    Args:
        topology: With a `fan_in` W, for S = C * W slots.
        values: `[..., S, bk, bn]`; slots of smallest norm leave.
        scores: `[..., R, C]`, a score of every block; the largest come in.
        fraction: Share of the blocks of each slice that leave.
        count: Blocks of each column afterwards, at most as many as before; W if not given.
    """
    (r, c), width = topology.grid, topology.fan_in or 0
    rows = topology.rows.reshape(*topology.rows.shape[:-1], c, width)
    norms = jnp.sum(jnp.square(values.astype(jnp.float32)), (-2, -1)).reshape(rows.shape)
    if count is None:
        count = width
    else:  # first every column gives up what is too much
        norms = jnp.where(rows < r, norms, -1.0)
        norms = jnp.where(select.keep_top(norms, count, (-1,)), norms, -1.0)
    leave = jnp.round(fraction * (c * count)).astype(jnp.int32)
    stay = select.keep_top(norms, c * count - leave, (-2, -1))
    at = rows[..., None] == jnp.arange(r, dtype=jnp.int32)  # [..., C, W, R]
    stored, stays = jnp.any(at, -2), jnp.any(at & stay[..., None], -2)
    wanted = jnp.where(stays, jnp.inf, scores.swapaxes(-1, -2))
    chosen = select.keep_top(wanted, count, (-1,))  # [..., C, R]
    keeps = jnp.any(at & chosen[..., None, :], -1)  # slots whose block is still wanted
    # The j-th block that comes into a column goes to its j-th free slot; further ones hold row R.
    come = jnp.cumsum(chosen & ~stored, -1, dtype=jnp.int32)
    place = jnp.cumsum(~keeps, -1, dtype=jnp.int32)
    came = jnp.sum(come[..., None, :] < place[..., None], -1, dtype=jnp.int32)
    rows = jnp.where(keeps, rows, came).reshape(topology.rows.shape)
    return plan(rows, topology.cols, topology.grid, fan_in=width)


def _mask(leaf: Any, topology: Any) -> Any:
    if not is_topology(topology):
        return jnp.array(True)
    slots = topology.used[..., None, None]
    return Stored(slots, jnp.zeros((1,) * leaf.probe.ndim, bool)) if is_stored(leaf) else slots


def _no_growth(leaf: Any, topology: Any) -> jax.Array:
    del topology
    return jnp.zeros(leaf.probe.shape if is_stored(leaf) else (), jnp.float32)
