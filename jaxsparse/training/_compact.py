"""Stored blocks and their optimizer state in arrays as small as what is in use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse.training._move_blocks import BlockState
from jaxsparse.training._sparsify import SparseState
from jaxsparse.training._stored import (
    Stored,
    in_containers_of,
    is_stored,
    is_topology,
    map_stored,
    values_of,
)
from pallas_kernels import Topology, plan

Tree = Any


class _Slots:
    """Which slots of a leaf stay, all if no topology; no pytree, so a leaf of a tree."""

    def __init__(self, topology: Topology | None = None):
        self.topology = topology
        if topology is None:
            return
        lead, (_, c) = topology.rows.shape[:-1], topology.grid
        used = np.asarray(topology.used).reshape(*lead, c, -1)
        width = max(1, int(used.sum(-1).max(initial=0)))
        first = np.argsort(~used, axis=-1, kind="stable")[..., :width]
        first = first + np.arange(c)[:, None] * used.shape[-1]
        self.shape = topology.rows.shape
        self.at = jnp.asarray(first.reshape(*lead, c * width), jnp.int32)
        rows, cols = self.of(topology.rows), self.of(topology.cols)
        self.topology = plan(rows, cols, topology.grid, fan_in=width)

    def of(self, leaf: Any) -> Any:
        """Values, or what an optimizer or a mask holds for each of them, at these slots."""
        if self.topology is None or jnp.shape(leaf)[: len(self.shape)] != self.shape:
            return leaf
        at = self.at.reshape(*self.at.shape, *(1,) * (leaf.ndim - self.at.ndim))
        return jnp.take_along_axis(leaf, at, len(self.shape) - 1)


def compact(tx: optax.GradientTransformation, params: Tree, state: Any) -> tuple[Tree, Any]:
    """Give back the memory and time of slots that hold no block, after `block_gradual` freed some.

    Every leaf keeps as many slots a column as its fullest column uses. Values, moments and masks
    move along, so training goes on as if nothing had happened, but for one compilation. On the
    host: call it a few times in a run, e.g. when the density has halved and at the end.

    Args:
        tx: The optimizer, which contains `sparsify` with an updater of stored blocks.
        params: Its parameters.
        state: Its state.

    Returns:
        Parameters and state for the same `tx`. To begin anew with `tx.init`, or to restore a
        checkpoint made later, make the updater from the new `state.updater.blocks`.

    Raises:
        ValueError: If the state has no stored blocks, or several `sparsify` inside.
        jax.errors.TracerArrayConversionError: Inside jit, where no shape can depend on a count.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> plan = jsp.uniform(0.75, jsp.Block((2, 2)))
        >>> values, blocks = jsp.blockify([jnp.ones((8, 8))], plan, density=1.0)
        >>> params, at = jsp.add_probes(values, blocks), {"when": jsp.once(0)}
        >>> at |= {"key": jax.random.key(0), "schedule": jsp.constant()}
        >>> tx = jsp.sparsify(optax.adam(0.1), jsp.block_gradual(blocks, plan, **at))
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> small, state = jsp.compact(tx, params, state)
        >>> params[0].values.shape, small[0].values.shape, state.inner[0].mu[0].values.shape
        ((16, 2, 2), (4, 2, 2), (4, 2, 2))

    Cost: a copy of parameters and state.
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=_has_blocks) if _has_blocks(s)]
    if len(found) != 1:
        raise ValueError(
            "compact needs one sparsify with an updater of stored blocks in the state; this one "
            f"has {len(found)}. Pass the state of sparsify(inner, block_gradual(...))."
        )
    probed = any(map(is_stored, jax.tree.leaves(params, is_leaf=is_stored)))
    placed = in_containers_of(params, found[0].updater.blocks, probed)

    def slots_of(leaf: Any, topology: Any) -> Any:
        slots: Any = _Slots(topology if is_topology(topology) else None)
        none: Any = _Slots()
        return Stored(slots, none) if is_stored(leaf) else slots

    def moved(leaf: Any, slots: _Slots) -> Any:
        return slots.of(leaf)

    def with_blocks(part: Any) -> Any:
        if not _has_blocks(part):
            return part
        return part._replace(updater=part.updater._replace(blocks=blocks))

    def topology_of(slots: Any, topology: Any) -> Any:
        held: Any = values_of(slots)
        return held.topology if is_topology(topology) else topology

    slots = map_stored(slots_of, params, placed)
    blocks = map_stored(topology_of, slots, placed)
    state = optax.tree_map_params(tx, moved, state, slots)
    state = jax.tree.map(with_blocks, state, is_leaf=_has_blocks)
    return jax.tree.map(moved, params, slots), state


def _has_blocks(part: Any) -> bool:
    return isinstance(part, SparseState) and isinstance(part.updater, BlockState)
