"""S-STE: Hu et al., Continuous pruning function for efficient 2:4 sparse pre-training, 2024."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse._masks import unpack_masks
from jaxsparse.patterns import NM, TransposableNM, make_mask
from jaxsparse.plans import LeafPlan, Plan
from jaxsparse.training._ste import keep_all, ste
from jaxsparse.training._updater import MaskUpdater

Tree = Any


class SSTEState(NamedTuple):
    """State of `s_ste`: steps taken, masks, and one scale for each matrix that has one."""

    count: jax.Array
    masks: Tree
    scales: jax.Array
    dense_weights = True


def nm_soft_threshold(pattern: NM, w: jax.Array) -> jax.Array:
    """n:m weights that move continuously: sign(w) * max(|w| - t, 0).

    t is the largest |w| that does not belong to the n largest of its group; for 2:4 the second
    smallest of the four. Where two weights change places both are zero, so nothing jumps.

    Args:
        pattern: `NM(n, m, axis)`.
        w: `[..., K, N]`.

    Returns:
        The shape, dtype and sharding of `w`; at most n of each group are not zero.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.nm_soft_threshold(jsp.NM(2, 4, axis=-1), jnp.array([[1.0, -4.0, 3.0, 2.0]]))
        Array([[ 0., -2.,  1.,  0.]], dtype=float32)

    Cost: a selection and three passes.

    References: Hu et al., 2024, arXiv:2409.09099.
    """
    return _shrink(pattern, w, make_mask(pattern, jnp.abs(w), pattern.n / pattern.m))


def _shrink(pattern: NM, w: jax.Array, mask: jax.Array) -> jax.Array:
    def shrink(w: jax.Array, mask: jax.Array) -> jax.Array:
        size = jnp.abs(w)
        zero = jnp.zeros((), w.dtype)
        gathered = pattern.gather(jnp.where(mask, zero, size))
        t = jnp.max(gathered, pattern.axes, keepdims=True)
        t = jnp.broadcast_to(t, gathered.shape).reshape(w.shape)
        return jnp.where(mask, jnp.sign(w) * jnp.maximum(size - t, zero), zero)

    return _tree.in_auto_mode(shrink, w, mask)


def s_ste(distribution: Callable[[Tree], Plan]) -> MaskUpdater:
    """Straight-through estimation with a soft threshold: the view is continuous in the weights.

    The loss is computed with beta * S(w): S is `nm_soft_threshold` and beta, one number for each
    matrix, is the least-squares fit of S(w) to the first weights, <w, S(w)> / <S(w), S(w)>, and
    never changes. The gradient passes straight through: dL/dw := dL/d(beta * S(w)).

    Args:
        distribution: Parameters -> `Plan` with `NM` patterns, e.g. `uniform(0.5, NM(2, 4))`.

    Returns:
        A `MaskUpdater`; the weights stay dense. At the end take `view(params, state.updater)`.

    Raises:
        ValueError: In `init`, if a leaf has another pattern than `NM`: only there a threshold of
            each small group is defined. Use `ste` or `sr_ste`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.s_ste(jsp.uniform(0.5, jsp.NM(2, 4, axis=-1)))
        >>> params = {"w": jnp.array([[1.0, -4.0, 3.0, 2.0]])}
        >>> state = jsp.sparsify(optax.sgd(0.1), updater).init(params)
        >>> float(state.updater.scales[0])  # (4 * 2 + 3 * 1) / (2 * 2 + 1 * 1)
        2.200000047683716

    Cost: as `ste`, and two passes over the weights in each view.

    Deviations: threshold, fit and plain straight-through backward were checked against the authors'
    code. That also rounds products to FP8, which is left out; its 2:4 sampling of gradients is
    `nm_matmul`. For other n:m the threshold is the (n + 1)-th largest. Masks keep n of each group
    even where a tie makes a kept weight zero.

    References: Hu et al., S-STE, 2024, arXiv:2409.09099.
    """
    base = ste(distribution)

    def init(params: Tree) -> SSTEState:
        plan = distribution(params)
        for path, leaf in zip(plan.paths, plan.leaves, strict=True):
            if leaf.sparsity:
                _nm(leaf, path)
        state = base.init(params)
        rows = zip(plan.leaves, jax.tree.leaves(params), jax.tree.leaves(state.masks), strict=True)
        scales = [_scale(_nm(leaf), w, m).reshape(-1) for leaf, w, m in rows if leaf.sparsity]
        scales = jnp.concatenate([jnp.zeros(0, jnp.float32), *scales])
        return SSTEState(state.count, state.masks, scales)

    def update(state: SSTEState, params: Tree, grads: Tree, **extra: Any) -> SSTEState:
        count, masks = base.update(state, params, grads, **extra)
        return SSTEState(count, masks, state.scales)

    def view(params: Tree, state: SSTEState) -> Tree:
        masks = _tree.in_containers_of(params, unpack_masks(state.masks), "the masks of this state")
        weights, treedef = jax.tree.flatten(params)
        rows = zip(weights, jax.tree.leaves(masks), distribution(params).leaves, strict=True)
        seen, at = [], 0
        for w, mask, leaf in rows:
            if leaf.sparsity:
                slices = math.prod(w.shape[:-2])
                beta = state.scales[at : at + slices].reshape(*w.shape[:-2], 1, 1)
                at += slices
                w = _show(_nm(leaf), w, mask, beta.astype(w.dtype))
            seen.append(w)
        return treedef.unflatten(seen)

    return MaskUpdater(init, update, view, keep_all, after_step=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _show(pattern: NM, w: jax.Array, mask: jax.Array, beta: jax.Array) -> jax.Array:
    return beta * _shrink(pattern, w, mask)


@_show.defjvp
def _show_jvp(pattern: NM, primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
    return _show(pattern, *primals), tangents[0]


def _scale(pattern: NM, w: jax.Array, mask: jax.Array) -> jax.Array:
    """The least-squares fit of the shrunk weight, for each matrix; 1 where that is all zero."""
    shrunk = _shrink(pattern, w, mask).astype(jnp.float32)
    top = jnp.sum(w.astype(jnp.float32) * shrunk, (-2, -1))
    bottom = jnp.sum(shrunk * shrunk, (-2, -1))
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), 1)


def _nm(leaf: LeafPlan, path: str = "a leaf") -> NM:
    """The pattern of a leaf; ValueError unless groups along one axis are all it asks for."""
    if not isinstance(leaf.pattern, NM) or isinstance(leaf.pattern, TransposableNM):
        raise ValueError(
            f"s_ste has a threshold for each group of an NM pattern; {path} has {leaf.pattern}. "
            "Use NM(n, m), or ste or sr_ste for this pattern."
        )
    return leaf.pattern
