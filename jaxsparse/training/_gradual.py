"""Gradual magnitude pruning: Zhu & Gupta, To prune, or not to prune, 2017, arXiv:1710.01878."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse._choose import all_scores, leaf_counts
from jaxsparse.patterns import Pattern, mask_of_count
from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.scores._evidence import ScoreFn, scorer
from jaxsparse.scores._magnitude import magnitude
from jaxsparse.training._updater import MaskUpdater, run_when

Tree = Any
# pattern, mask, scores, grad, count of kept units, step -> mask
Move = Callable[[Pattern, jax.Array, jax.Array, jax.Array, Any, jax.Array], jax.Array]


class GradualState(NamedTuple):
    """State of `gradual` and `blast`: steps taken (int32) and masks."""

    count: jax.Array
    masks: Tree


def gradual(
    distribution: Callable[[Tree], Plan],
    *,
    schedule: Schedule,
    when: When,
    score: ScoreFn = magnitude,
) -> MaskUpdater:
    """Prune more and more while training.

    At an update at step t each leaf keeps the units of largest score at the sparsity
    `schedule(t) * final`; N:M leaves keep round(density * m) of each group on the way. The last
    update always happens at the step at which the schedule first reaches 1.

    Args:
        distribution: Parameters -> `Plan` with the final sparsities; allocators (`global_`, `lamp`)
            follow the scores at each update.
        schedule: Step -> share of the final sparsity, 0 to 1, e.g. `cubic(begin, end)`.
        when: Step -> whether to prune, e.g. `every(100)`.
        score: Leaf -> scores. Evidence beyond `grad` is given to `tx.update(..., fisher=...)`.

    Returns:
        A `MaskUpdater`; all masks are True until the first update.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> gmp = jsp.gradual(jsp.uniform(0.5), schedule=jsp.cubic(0, 2), when=jsp.every(1))
        >>> tx, params = jsp.sparsify(optax.sgd(0.1), gmp), {"w": jnp.arange(1.0, 17).reshape(4, 4)}
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update({"w": jnp.zeros((4, 4))}, state, params)
        >>> int(jsp.masks(state)["w"].sum())
        8

    Cost: masks of 1 byte a weight; a selection at each update.

    References: Zhu & Gupta, To prune, or not to prune, 2017, arXiv:1710.01878.
    """

    def prune(
        pattern: Pattern, mask: jax.Array, scores: jax.Array, grad: jax.Array, count: Any, step: Any
    ) -> jax.Array:
        del mask, grad, step
        return mask_of_count(pattern, scores, count)

    return on_schedule(distribution, schedule=schedule, when=when, score=score, move=prune)


def on_schedule(
    distribution: Callable[[Tree], Plan],
    *,
    schedule: Schedule,
    when: When,
    score: ScoreFn,
    move: Move,
) -> MaskUpdater:
    """The engine: masks that are all True at first and move to the counts of a schedule.

    The arguments are those of `gradual`; `move` makes the new mask of a leaf.
    """
    due_at = or_when_reached(when, schedule)

    def init(params: Tree) -> GradualState:
        plan = distribution(params)
        weights, treedef = jax.tree.flatten(params)
        masks = [
            jnp.ones_like(w, bool) if leaf.sparsity else jnp.array(True)
            for w, leaf in zip(weights, plan.leaves, strict=True)
        ]
        return GradualState(jnp.zeros((), jnp.int32), treedef.unflatten(masks))

    def update(
        state: GradualState, params: Tree, grads: Tree, *, finite: jax.Array, **extra: Any
    ) -> GradualState:
        step = state.count
        share = jnp.asarray(schedule(step), jnp.float32)
        due = due_at(step) & finite
        plan = distribution(params)
        score_of = scorer(score, params, {"grad": grads, **extra})
        counts = _counts_when(due, distribution, plan, score_of, share)
        slopes = jax.tree.leaves(grads)
        masks, treedef = jax.tree.flatten(state.masks)
        for i, leaf in enumerate(plan.leaves):
            if leaf.sparsity:

                def move_leaf(mask: jax.Array, i: int = i) -> jax.Array:
                    pattern = plan.leaves[i].pattern
                    return move(pattern, mask, score_of(i), slopes[i], counts[i], step)

                masks[i] = run_when(due, move_leaf, masks[i])
        return GradualState(step + finite.astype(jnp.int32), treedef.unflatten(masks))

    return MaskUpdater(init, update)


def or_when_reached(when: When, schedule: Schedule) -> When:
    """`when`, and the step at which the schedule first reaches 1."""

    def due(step: jax.Array) -> jax.Array:
        reached = jnp.asarray(schedule(step)) >= 1
        return when(step) | (reached & ((step == 0) | (jnp.asarray(schedule(step - 1)) < 1)))

    return due


def _counts_when(
    due: jax.Array,
    distribution: Callable[[Tree], Plan],
    plan: Plan,
    score_of: Callable[[int], jax.Array],
    share: jax.Array,
) -> list[Any]:
    """Kept units of each leaf; an allocator, which reads all scores, is asked only when due."""
    if getattr(distribution, "allocate", None) is None:
        return leaf_counts(distribution, plan, [], share)

    def allocate(_: Any) -> list[jax.Array]:
        scores = all_scores(distribution, plan, score_of)
        counts = leaf_counts(distribution, plan, scores, share)
        return [jnp.asarray(count, jnp.int32) for count in counts]

    shapes = jax.eval_shape(allocate, None)
    return run_when(due, allocate, [jnp.zeros(s.shape, s.dtype) for s in shapes])
