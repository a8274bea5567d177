"""The engine of training on stored blocks: which slot holds which block, and when that changes.

The parameters are the values `[..., S, bk, bn]`; topologies live in the state and `view` joins the
two. A slot that is given to another block is to `sparsify` a slot whose mask fell: its value
becomes zero and its moments are cleared. Every block column keeps its number of blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _tree, select
from jaxsparse.formats._block_sparse import BlockSparse
from jaxsparse.formats._probe import Probe
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._prune_and_grow import fraction_schedule
from jaxsparse.training._updater import MaskUpdater, run_when
from pallas_kernels import Topology, plan

Tree = Any


class Stored(NamedTuple):
    """Stored values and a probe for the gradient of every block; see `add_probes`.

    Attributes:
        values: `[..., S, bk, bn]`.
        probe: Zeros `[..., R, C]`.
    """

    values: jax.Array
    probe: jax.Array


class BlockState(NamedTuple):
    """State of the updaters of stored blocks.

    Attributes:
        count: Steps taken, int32.
        masks: `[..., S, 1, 1]`, True for every slot; False for probes, which stay zero.
        blocks: `Topology` of each stored leaf, and True for the others.
        growth: Of each probed leaf the sum of the squared gradients of its probe since the last
            update, float32 `[..., R, C]`; 0 for the others.
    """

    count: jax.Array
    masks: Tree
    blocks: Tree
    growth: Tree


def _is_topology(x: Any) -> bool:
    return isinstance(x, Topology)


def _is_stored(x: Any) -> bool:
    return isinstance(x, Stored)


def _values(leaf: Any) -> jax.Array:
    return leaf.values if _is_stored(leaf) else leaf


def add_probes(values: Tree, blocks: Tree) -> Tree:
    """Parameters for `block_rigl`: each stored leaf with a probe `[..., K/bk, N/bn]` of zeros.

    Args:
        values: First result of `blockify`.
        blocks: Second result of `blockify`.

    Returns:
        The tree with a `Stored(values, probe)` for each stored leaf.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> values, blocks = jsp.blockify([jnp.eye(4)], jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> jsp.add_probes(values, blocks)[0].probe.shape
        (2, 2)
    """

    def of_leaf(leaf: Any, topology: Any) -> Any:
        if not _is_topology(topology):
            return leaf
        return Stored(leaf, jnp.zeros((*topology.rows.shape[:-1], *topology.grid), leaf.dtype))

    return jax.tree.map(of_leaf, values, _in_containers_of(values, blocks))


def move_blocks(
    blocks: Tree,
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule,
    probed: bool,
) -> MaskUpdater:
    """An updater that drops the blocks of smallest norm and grows others.

    Of the S slots of each slice round(drop * S) leave, wherever they stand, and as many blocks come
    into the same columns: of largest gradient where there are probes, else at random. A block that
    is dropped may come back in the same update; it then keeps its value and moments.

    Args:
        blocks: Second result of `blockify`.
        key: Random key of growth, or of the signs of the probes.
        when: Step -> whether to move.
        drop_fraction: Share of the slots to move, 0 to 1, or a schedule.
        probed: Whether stored leaves have probes.
    """
    fraction_at = fraction_schedule(drop_fraction, "stored blocks")

    def init(params: Tree) -> BlockState:
        count = jnp.zeros((), jnp.int32)
        if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder
            return BlockState(count, params, params, params)
        placed = _in_containers_of(params, blocks, probed)
        masks = _map(_mask, params, placed)
        growth = _map(_no_growth, params, placed)
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
            if not _is_stored(slope):
                return growth
            return growth + jnp.where(finite, jnp.square(slope.probe.astype(jnp.float32)), 0)

        growth = jax.tree.map(gathered, state.growth, grads)
        leaves = jax.tree.leaves(params, is_leaf=_is_stored)
        found, treedef = jax.tree.flatten(state.blocks, is_leaf=_is_topology)
        scores = treedef.flatten_up_to(growth)
        for i, (path, leaf) in enumerate(zip(_paths(params), leaves, strict=True)):
            if not _is_topology(found[i]):
                continue

            def move(
                held: tuple[Topology, jax.Array], path: str = path, leaf: Any = leaf
            ) -> tuple[Topology, jax.Array]:
                topology, seen = held
                if probed:
                    wanted = seen
                else:
                    noise = jax.random.fold_in(_tree.leaf_key(key, path), step)
                    shape = (*topology.rows.shape[:-1], *topology.grid)
                    wanted = jax.random.uniform(noise, shape)
                return move_slots(topology, _values(leaf), wanted, fraction), jnp.zeros_like(seen)

            found[i], scores[i] = run_when(due, move, (found[i], scores[i]))
        return BlockState(
            step + finite.astype(jnp.int32),
            state.masks,
            treedef.unflatten(found),
            treedef.unflatten(scores),
        )

    def view(params: Tree, state: BlockState) -> Tree:
        placed = _in_containers_of(params, state.blocks, probed)
        paths = iter(_paths(params))

        def of_leaf(leaf: Any, topology: Any) -> Any:
            path = next(paths)
            if not _is_topology(topology):
                return leaf
            if not probed:
                return BlockSparse(leaf, topology)
            lead, (*_, bk, bn) = topology.rows.shape[:-1], leaf.values.shape
            ku, kv = jax.random.split(jax.random.fold_in(_tree.leaf_key(key, path), state.count))
            u = jax.random.rademacher(ku, (*lead, bk), leaf.values.dtype)
            v = jax.random.rademacher(kv, (*lead, bn), leaf.values.dtype)
            return BlockSparse(leaf.values, topology, Probe(leaf.probe, u, v))

        return _map(of_leaf, params, placed)

    return MaskUpdater(init, update, view, kept)


def kept(old: BlockState, new: BlockState) -> Tree:
    """Slots that hold the same block before and after; never a probe."""

    def of_leaf(before: Any, after: Any, mask: Any) -> Any:
        if not _is_topology(before):
            return mask
        same = (before.rows == after.rows)[..., None, None]
        return mask._replace(values=same) if _is_stored(mask) else same

    return jax.tree.map(of_leaf, old.blocks, new.blocks, old.masks, is_leaf=_is_topology)


def move_slots(
    topology: Topology, values: jax.Array, scores: jax.Array, fraction: jax.Array
) -> Topology:
    """The topology after one drop and grow.

    Args:
        topology: With a `fan_in` W, for S = C * W slots.
        values: `[..., S, bk, bn]`; slots of smallest norm leave.
        scores: `[..., R, C]`, a score of every block; the largest come in.
        fraction: Share of the slots of each slice that leave.
    """
    (r, c), width = topology.grid, topology.fan_in or 0
    rows = topology.rows.reshape(*topology.rows.shape[:-1], c, width)
    norms = jnp.sum(jnp.square(values.astype(jnp.float32)), (-2, -1)).reshape(rows.shape)
    leave = jnp.round(fraction * (c * width)).astype(jnp.int32)
    stay = select.keep_top(norms, c * width - leave, (-2, -1))
    at = rows[..., None] == jnp.arange(r, dtype=jnp.int32)  # [..., C, W, R]
    stored, stays = jnp.any(at, -2), jnp.any(at & stay[..., None], -2)
    wanted = jnp.where(stays, jnp.inf, scores.swapaxes(-1, -2))
    chosen = select.keep_top(wanted, width, (-1,))  # [..., C, R]
    keeps = jnp.any(at & chosen[..., None, :], -1)  # slots whose block is still wanted
    # The j-th block that comes into a column goes to its j-th free slot.
    come = jnp.cumsum(chosen & ~stored, -1, dtype=jnp.int32)
    place = jnp.cumsum(~keeps, -1, dtype=jnp.int32)
    came = jnp.sum(come[..., None, :] < place[..., None], -1, dtype=jnp.int32)
    rows = jnp.where(keeps, rows, came).reshape(topology.rows.shape)
    return plan(rows, topology.cols, topology.grid, fan_in=width)


def _paths(params: Tree) -> list[str]:
    """The path of each leaf, a `Stored` being one."""
    return _tree.paths(jax.tree.map(lambda _: 0, params, is_leaf=_is_stored))


def _map(fn: Any, params: Tree, blocks: Tree) -> Tree:
    return jax.tree.map(fn, params, blocks, is_leaf=_is_stored)


def _mask(leaf: Any, topology: Any) -> Any:
    if not _is_topology(topology):
        return jnp.array(True)
    slots = jnp.ones((*topology.rows.shape, 1, 1), bool)
    return Stored(slots, jnp.zeros((1,) * leaf.probe.ndim, bool)) if _is_stored(leaf) else slots


def _no_growth(leaf: Any, topology: Any) -> jax.Array:
    del topology
    return jnp.zeros(leaf.probe.shape if _is_stored(leaf) else (), jnp.float32)


def _in_containers_of(params: Tree, blocks: Tree, probed: bool = False) -> Tree:
    """The topologies in the containers of the parameters; raises where they do not fit."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=_is_stored)
    placed = jax.tree.leaves(blocks, is_leaf=_is_topology)
    if len(leaves) != len(placed):
        raise ValueError(
            f"the parameters have {len(leaves)} leaves, but blocks has {len(placed)}: pass both "
            "results of the same blockify."
        )
    for path, leaf, topology in zip(_paths(params), leaves, placed, strict=True):
        if not _is_topology(topology):
            continue
        if _is_stored(leaf) != probed:
            raise ValueError(
                f"{path} has {'a' if _is_stored(leaf) else 'no'} probe: block_rigl trains "
                "add_probes(values, blocks), the other updaters of stored blocks the values alone."
            )
        if topology.fan_in is None or _values(leaf).shape[:-2] != topology.rows.shape:
            raise ValueError(
                f"{path} has values {_values(leaf).shape}, but its topology has slots "
                f"{topology.rows.shape} and fan_in={topology.fan_in}. Values are [..., S, bk, bn] "
                "and every column has as many blocks: pass both results of the same blockify."
            )
    return treedef.unflatten(placed)
