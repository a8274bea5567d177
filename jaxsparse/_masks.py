"""Masks: apply them, measure them, pack them into bits.

A mask tree has the structure of its parameters. A leaf is bool, True = kept, and broadcasts to its
weight; a leaf that is never pruned has the scalar `True`.

Packed, eight rows of axis -2 share a byte: `[..., K, N]` bool becomes `[..., K/8, N]` uint8, so
that rank and PartitionSpec still apply. A leaf whose K is no multiple of 8, or whose K/8 does not
divide over the devices, stays bool.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxsparse import _tree

Tree = Any


def is_hidden(x: Any) -> bool:
    """Whether a leaf is one that `optax.masked` or `multi_transform` leaves to others."""
    return isinstance(x, optax.MaskedNode)


def check_fit(tree: Tree, masks: Tree) -> None:
    """Raise a ValueError that names the first leaf whose mask is not bool or does not fit."""
    _tree.same_structure(masks, tree, "masks")
    for path, x, mask in zip(
        _tree.paths(tree), jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True
    ):
        if jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"the mask of {path} must be bool; got {jnp.result_type(mask)}. Write mask != 0."
            )
        try:
            fits = jnp.broadcast_shapes(jnp.shape(mask), jnp.shape(x)) == jnp.shape(x)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"the mask of {path} has shape {jnp.shape(mask)}, which does not broadcast to its "
                f"weight {jnp.shape(x)}. Make masks from these parameters."
            )


def apply_leaf(x: Any, mask: Any) -> Any:
    """Zero where the mask is False; a scalar mask means a dense leaf, left as it is."""
    return x if jnp.ndim(mask) == 0 else jnp.where(mask, x, jnp.zeros((), jnp.result_type(x)))


def apply_masks(tree: Tree, masks: Tree) -> Tree:
    """Set entries to zero where the mask is False.

    Args:
        tree: Parameters, gradients, or anything of their structure.
        masks: Mask tree, e.g. `jsp.masks(state)`.

    Returns:
        The tree with the same dtypes, exactly zero (also where it was NaN) off the masks.

    Raises:
        ValueError: If the masks do not fit the tree; names the leaf.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
        {'w': Array([1., 0.], dtype=float32)}
    """
    check_fit(tree, masks)
    return jax.tree.map(apply_leaf, tree, _tree.in_containers_of(tree, masks, "masks"))


def kept_and_size(masks: Tree, params: Tree | None = None) -> tuple[list[Any], list[int]]:
    """Per leaf, how many entries are kept and how many there are; see `density`."""
    leaves = jax.tree.leaves(masks)
    if params is None:
        shapes = [jnp.shape(mask) for mask in leaves if jnp.ndim(mask)]
        leaves = [mask for mask in leaves if jnp.ndim(mask)]
    else:
        check_fit(params, masks)
        shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    sizes = [math.prod(shape) for shape in shapes]
    kept = [
        size if not jnp.ndim(mask) else jnp.sum(mask, dtype=jnp.int32) * (size // max(mask.size, 1))
        for mask, size in zip(leaves, sizes, strict=True)
    ]
    return kept, sizes


def density(masks: Tree, params: Tree | None = None) -> jax.Array:
    """Share of entries kept, 0 to 1.

    Args:
        masks: Mask tree.
        params: With parameters, the share of all of them, leaves that are never pruned included.
            Without, the share of the leaves that have a mask.

    Returns:
        A float32 scalar; 1 if there is nothing to count.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> masks = {"w": jnp.array([True, False, False, False]), "b": jnp.array(True)}
        >>> params = {"w": jnp.ones(4), "b": jnp.ones(4)}
        >>> float(jsp.density(masks)), float(jsp.density(masks, params))
        (0.25, 0.625)
    """
    kept, sizes = kept_and_size(masks, params)
    return (
        jnp.asarray(sum(jnp.asarray(k, jnp.float32) for k in kept) / max(sum(sizes), 1))
        if sizes
        else jnp.ones(())
    )


def sparsity(masks: Tree, params: Tree | None = None) -> jax.Array:
    """Share of entries removed: `1 - density(masks, params)`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> float(jsp.sparsity({"w": jnp.array([True, False, False, False])}))
        0.75
    """
    return 1.0 - density(masks, params)


def _pairs(old: Tree, new: Tree) -> list[tuple[jax.Array, jax.Array]]:
    _tree.same_structure(new, old, "the second masks")
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return [(jnp.asarray(a), jnp.asarray(b)) for a, b in pairs if jnp.ndim(a) or jnp.ndim(b)]


def _ratio(parts: list[tuple[jax.Array, jax.Array]], empty: float) -> jax.Array:
    """Sum of the first over sum of the second, each a per-leaf count."""
    top = sum(jnp.sum(a, dtype=jnp.int32).astype(jnp.float32) for a, _ in parts)
    bottom = sum(jnp.sum(b, dtype=jnp.int32).astype(jnp.float32) for _, b in parts)
    return jnp.where(bottom == 0, jnp.float32(empty), top / jnp.maximum(bottom, 1))


def overlap(a: Tree, b: Tree) -> jax.Array:
    """Entries kept by both masks over entries kept by either (Jaccard index), 0 to 1.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> float(jsp.overlap([jnp.array([True, True, False])], [jnp.array([True, False, False])]))
        0.5
    """
    return _ratio([(x & y, x | y) for x, y in _pairs(a, b)], empty=1.0)


def churn(old: Tree, new: Tree) -> jax.Array:
    """Share of entries whose mask flipped between two mask trees, 0 to 1.

    The sparse architecture divergence of SR-STE (Zhou et al., 2021, arXiv:2102.04010) over the
    number of masked entries, which is the flip rate of Hu et al., 2024, arXiv:2404.01847.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> old, new = jnp.array([True, True, False, False]), jnp.array([True, False, True, False])
        >>> float(jsp.churn([old], [new]))
        0.5
    """
    return _ratio([(x ^ y, jnp.ones_like(x ^ y)) for x, y in _pairs(old, new)], empty=0.0)


def _packable(mask: Any) -> bool:
    if jnp.ndim(mask) < 2 or jnp.shape(mask)[-2] % 8 or jnp.result_type(mask) != jnp.bool_:
        return False
    if isinstance(mask, Tracer) or not isinstance(mask, jax.Array):
        return True
    *lead, k, n = mask.shape
    try:
        mask.sharding.shard_shape((*lead, k // 8, n))
    except ValueError:
        return False
    return True


def _pack(mask: jax.Array) -> jax.Array:
    def pack(mask: jax.Array) -> jax.Array:
        *lead, k, n = mask.shape
        rows = mask.reshape(*lead, k // 8, 8, n).astype(jnp.uint8)
        bits = rows << jnp.arange(8, dtype=jnp.uint8)[:, None]
        return jnp.sum(bits, -2, dtype=jnp.uint8)

    return _tree.in_auto_mode(pack, mask)


def _unpack(bits: jax.Array) -> jax.Array:
    def unpack(bits: jax.Array) -> jax.Array:
        *lead, rows, n = bits.shape
        ones = (bits[..., None, :] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & jnp.uint8(1)
        return (ones != 0).reshape(*lead, rows * 8, n)

    return _tree.in_auto_mode(unpack, bits)


def pack_masks(masks: Tree, like: Tree | None = None) -> Tree:
    """Masks at one bit a weight: `[..., K, N]` bool to `[..., K/8, N]` uint8.

    Bit i of byte r is row 8r + i. Scalars and leaves that cannot be packed stay as they are.

    Args:
        masks: Mask tree of bools.
        like: A packed tree of the same masks at another time: the same leaves are packed.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> packed = jsp.pack_masks({"w": jnp.ones((16, 4), bool)})
        >>> packed["w"].shape, packed["w"].dtype, bool(jsp.unpack_masks(packed)["w"].all())
        ((2, 4), dtype('uint8'), True)
    """
    if like is None:
        return jax.tree.map(lambda m: _pack(m) if _packable(m) else m, masks)
    return jax.tree.map(lambda m, old: _pack(m) if old.dtype == jnp.uint8 else m, masks, like)


def unpack_masks(masks: Tree) -> Tree:
    """Bools from `pack_masks`; bool leaves stay as they are.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.unpack_masks({"w": jnp.array([[3]], jnp.uint8)})["w"][:3, 0]
        Array([ True,  True, False], dtype=bool)
    """
    return jax.tree.map(lambda m: _unpack(m) if jnp.result_type(m) == jnp.uint8 else m, masks)
