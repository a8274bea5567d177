"""The engine of dynamic sparse training: drop some of what is kept, grow as much elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _tree, select
from jaxsparse._choose import choose
from jaxsparse.patterns import Pattern, mask_of_count
from jaxsparse.plans import LeafPlan, Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.scores._evidence import scorer
from jaxsparse.scores._random import random
from jaxsparse.training._updater import MaskUpdater, run_when

Tree = Any
Grow = Callable[[str, jax.Array, jax.Array, jax.Array], jax.Array]  # path, w, grad, step -> scores
# path, plan of the leaf, mask, w, scores of growth, fraction -> mask
Move = Callable[[str, LeafPlan, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class DynamicState(NamedTuple):
    """State of `set_`, `rigl` and `srigl`: steps taken (int32) and masks."""

    count: jax.Array
    masks: Tree


def fraction_schedule(
    drop_fraction: float | Schedule, what: str
) -> Callable[[jax.Array], jax.Array]:
    """Step -> the share to move, float32; ValueError if a number is outside [0, 1]."""
    if callable(drop_fraction):
        return lambda step: jnp.asarray(drop_fraction(step), jnp.float32)
    if not 0 <= drop_fraction <= 1:
        raise ValueError(
            f"drop_fraction is the share of {what} to move, 0 to 1; got {drop_fraction}."
        )
    return lambda step: jnp.asarray(drop_fraction, jnp.float32)


def prune_and_grow(
    distribution: Callable[[Tree], Plan],
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule,
    grow: Grow,
    move: Move | None = None,
) -> MaskUpdater:
    """Random masks that drop their smallest weights and grow by `grow` at some steps.

    If `move` is not given every group keeps its count: with k units kept, round(drop * k) leave and
    as many come in. A unit that is dropped may come back in the same update; it then keeps its
    value and moments.
    """
    move_leaf = move or _keeping_counts
    fraction_at = fraction_schedule(drop_fraction, "kept weights")

    def init(params: Tree) -> DynamicState:
        masks = choose(distribution, params, scorer(random, params, {"key": key}))
        return DynamicState(jnp.zeros((), jnp.int32), masks)

    def update(
        state: DynamicState, params: Tree, grads: Tree, *, finite: jax.Array, **extra: Any
    ) -> DynamicState:
        del extra
        step = state.count
        due = when(step) & finite
        fraction = fraction_at(step)
        plan = distribution(params)
        weights, slopes = jax.tree.leaves(params), jax.tree.leaves(grads)
        masks, treedef = jax.tree.flatten(state.masks)
        for i, leaf in enumerate(plan.leaves):
            if leaf.sparsity:

                def moved(mask: jax.Array, i: int = i) -> jax.Array:
                    path, leaf, w = plan.paths[i], plan.leaves[i], weights[i]
                    return move_leaf(path, leaf, mask, w, grow(path, w, slopes[i], step), fraction)

                masks[i] = run_when(due, moved, masks[i])
        return DynamicState(step + finite.astype(jnp.int32), treedef.unflatten(masks))

    return MaskUpdater(init, update)


def _keeping_counts(
    path: str,
    leaf: LeafPlan,
    mask: jax.Array,
    w: jax.Array,
    grow_scores: jax.Array,
    fraction: jax.Array,
) -> jax.Array:
    del path
    return move_units(leaf.pattern, mask, w, grow_scores, fraction)


def move_units(
    pattern: Pattern,
    mask: jax.Array,
    w: jax.Array,
    grow_scores: jax.Array,
    fraction: jax.Array,
) -> jax.Array:
    """The mask after one drop and grow.

    Args:
        pattern: Units and groups.
        mask: bool `[..., K, N]`.
        w: Weight of that shape; the smallest |w| in the mask leave.
        grow_scores: Scores of that shape; the largest outside the mask come in.
        fraction: Share of the kept units of each group that leave.
    """

    def move(
        w: jax.Array, mask: jax.Array, grow_scores: jax.Array, fraction: jax.Array
    ) -> jax.Array:
        held = select.count_true(pattern.gather(mask.astype(jnp.int8)) > 0, pattern.axes)
        stay = held - jnp.round(fraction * held).astype(jnp.int32)
        low, high = jnp.asarray(-jnp.inf, w.dtype), jnp.asarray(jnp.inf, grow_scores.dtype)
        stays = mask_of_count(pattern, jnp.where(mask, jnp.abs(w), low), stay)
        return mask_of_count(pattern, jnp.where(stays, high, grow_scores), held)

    return _tree.in_auto_mode(move, w, mask, grow_scores, fraction)
