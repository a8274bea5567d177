"""From a distribution and scores to the masks of a whole tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse.patterns import kept_units, mask_of_count, units
from jaxsparse.plans import Counts, Plan

Tree = Any


def choose(
    distribution: Callable[[Tree], Plan],
    params: Tree,
    score_of: Callable[[int], jax.Array],
    share: Any = 1.0,
) -> Tree:
    """Masks that keep the best-scored units of each leaf.

    Args:
        distribution: Parameters -> `Plan`.
        params: Parameters; only shapes, dtypes and paths count.
        score_of: Index of a pruned leaf -> its scores.
        share: Share of the final sparsity, 0 to 1, a number or traced.

    Returns:
        A mask tree: bool of the shape of the weight, or scalar True for a dense leaf.
    """
    plan = distribution(params)
    treedef = jax.tree.structure(params)
    scores = all_scores(distribution, plan, score_of)
    counts = leaf_counts(distribution, plan, scores, share)
    masks = [
        mask_of_count(leaf.pattern, score_of(i) if scores[i] is None else scores[i], counts[i])
        if leaf.sparsity
        else jnp.array(True)
        for i, leaf in enumerate(plan.leaves)
    ]
    return treedef.unflatten(masks)


def all_scores(
    distribution: Callable[[Tree], Plan], plan: Plan, score_of: Callable[[int], jax.Array]
) -> list[jax.Array | None]:
    """Scores of the leaves that an allocator weighs against each other; else None."""
    allocates = getattr(distribution, "allocate", None) is not None
    return [score_of(i) if allocates and pooled else None for i, pooled in enumerate(plan.pooled)]


def leaf_counts(
    distribution: Callable[[Tree], Plan], plan: Plan, scores: list[Any], share: Any = 1.0
) -> Counts:
    """Kept units per group of each leaf at `share` of the final sparsity.

    Args:
        distribution: Asked for its `allocate`, if it has one.
        plan: What it made of the parameters.
        scores: Scores of each pruned leaf, used by allocators only.
        share: 0 to 1, a number or traced; at 1 the count is exactly the final one.

    Returns:
        An int, or an int32 scalar or one per leading slice, for each leaf; 0 for dense leaves.
    """
    allocate = getattr(distribution, "allocate", None)
    counts: Counts = []
    for leaf, shape in zip(plan.leaves, plan.shapes, strict=True):
        if not leaf.sparsity:
            counts.append(0)
            continue
        size = units(leaf.pattern, shape)
        final = kept_units(leaf.density, size)
        if not isinstance(share, (int, float)):
            final = jnp.where(share >= 1, final, kept_units(1 - share * leaf.sparsity, size))
        elif share != 1:
            final = kept_units(1 - share * leaf.sparsity, size)
        counts.append(final)
    if allocate is None or not any(plan.pooled):
        return counts
    some = next(s for s in scores if s is not None)
    moved = _tree.in_auto_mode(
        lambda _, scores, share: allocate(scores, plan, share),
        some,
        scores,
        share,
        replicated=True,
    )
    return [m if p else c for m, p, c in zip(moved, plan.pooled, counts, strict=True)]
