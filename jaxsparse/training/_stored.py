"""Parameter trees with stored blocks: values, perhaps with a probe, and their topologies."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from pallas_kernels import Topology

Tree = Any


class Stored(NamedTuple):
    """Stored values and a probe for the gradient of every block; see `add_probes`.

    Attributes:
        values: `[..., S, bk, bn]`.
        probe: Zeros `[..., R, C]`.
    """

    values: jax.Array
    probe: jax.Array


def is_topology(x: Any) -> bool:
    return isinstance(x, Topology)


def is_stored(x: Any) -> bool:
    return isinstance(x, Stored)


def values_of(leaf: Any) -> jax.Array:
    return leaf.values if is_stored(leaf) else leaf


def add_probes(values: Tree, blocks: Tree) -> Tree:
    """Parameters for updaters with probes: each stored leaf with zeros `[..., K/bk, N/bn]`.

    For `block_rigl` and `block_gradual`.

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
        if not is_topology(topology):
            return leaf
        return Stored(leaf, jnp.zeros((*topology.rows.shape[:-1], *topology.grid), leaf.dtype))

    return jax.tree.map(of_leaf, values, in_containers_of(values, blocks))


def stored_paths(params: Tree) -> list[str]:
    """The path of each leaf, a `Stored` being one."""
    return _tree.paths(jax.tree.map(lambda _: 0, params, is_leaf=is_stored))


def map_stored(fn: Any, params: Tree, blocks: Tree) -> Tree:
    return jax.tree.map(fn, params, blocks, is_leaf=is_stored)


def in_containers_of(params: Tree, blocks: Tree, probed: bool = False) -> Tree:
    """The topologies in the containers of the parameters; raises where they do not fit."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_stored)
    placed = jax.tree.leaves(blocks, is_leaf=is_topology)
    if len(leaves) != len(placed):
        raise ValueError(
            f"the parameters have {len(leaves)} leaves, but blocks has {len(placed)}: pass both "
            "results of the same blockify."
        )
    for path, leaf, topology in zip(stored_paths(params), leaves, placed, strict=True):
        if not is_topology(topology):
            continue
        if is_stored(leaf) != probed:
            raise ValueError(
                f"{path} has {'a' if is_stored(leaf) else 'no'} probe: block_rigl and "
                "block_gradual train add_probes(values, blocks), the other updaters of stored "
                "blocks the values alone."
            )
        if topology.fan_in is None or values_of(leaf).shape[:-2] != topology.rows.shape:
            raise ValueError(
                f"{path} has values {values_of(leaf).shape}, but its topology has slots "
                f"{topology.rows.shape} and fan_in={topology.fan_in}. Values are [..., S, bk, bn] "
                "and every column has as many blocks: pass both results of the same blockify."
            )
    return treedef.unflatten(placed)
