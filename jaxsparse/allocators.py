"""Allocators: densities that follow the scores instead of the shapes.

Both find one threshold for all pooled leaves, by bisection on counts: no leaf is sorted, flattened
or gathered. Counts are exact: the kept weights add up to the target, up to the size of one unit.
Leaves that an override set, and N:M leaves, keep their own sparsity and are set apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import select
from jaxsparse.patterns import Pattern, Unstructured, kept_units, units
from jaxsparse.plans import Counts, Distribution, LeafPlan, Plan, Where, check_sparsity

Survivors = Callable[
    [jax.Array], jax.Array
]  # threshold (int32 key) -> units at or above it, [lead]


def global_(
    sparsity: float,
    pattern: Pattern = Unstructured(),
    where: Where | None = None,
    overrides: Mapping[Where, float | LeafPlan] | None = None,
    *,
    floor: float = 0.01,
) -> Distribution:
    """One score threshold over all pruned leaves: each keeps what lies above it.

    Args:
        sparsity: Fraction removed of all leaves together, in [0, 1).
        pattern: As in `uniform`; units of several weights compete by their mean score.
        where: As in `uniform`.
        overrides: As in `uniform`; these leaves stay out of the pool.
        floor: Share of the units of each slice that is kept whatever the scores, and at least one
            unit, so that no leaf empties.

    Returns:
        A distribution with an allocator, for `prune`, `static`, `gradual`, `ste` and `sr_ste`.

    Raises:
        ValueError: As in `uniform`, or if floor lies outside [0, 1 - sparsity].

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params = {"a": jnp.full((4, 4), 0.1), "b": jnp.arange(16.0).reshape(4, 4)}
        >>> _, masks = jsp.prune(params, jsp.global_(0.5))
        >>> int(masks["a"].sum()), int(masks["b"].sum())
        (1, 15)

    References: Han et al., 2015, arXiv:1506.02626; Blalock et al., 2020, arXiv:2003.03033.
    """
    _check_floor(floor, sparsity)

    def allocate(scores: list[Any], plan: Plan, share: Any) -> Counts:
        def survivors(i: int) -> Survivors:
            pattern, shape = plan.leaves[i].pattern, plan.shapes[i]
            means = pattern.gather(scores[i]).astype(jnp.float32) / _unit_size(pattern, shape)
            key = select.sort_key(means)
            lead = _lead(pattern, shape)
            axes = tuple(range(len(lead) - key.ndim, 0))
            return lambda t: select.count_true(key >= t, axes).reshape(lead)

        return _allocate(plan, share, sparsity, floor, survivors)

    return Distribution(sparsity, pattern, where, dict(overrides or {}), allocate=allocate)


def lamp(
    sparsity: float,
    pattern: Pattern = Unstructured(),
    where: Where | None = None,
    overrides: Mapping[Where, float | LeafPlan] | None = None,
    *,
    floor: float = 0.01,
) -> Distribution:
    """Layer-adaptive magnitude: a global threshold on each weight's share of what is left.

    lamp(u) = w_u^2 / (sum of w_v^2 over all v of the same slice with |w_v| >= |w_u|), then one
    threshold over all leaves. Within a slice the order is that of |w|, so only densities change.

    Args:
        sparsity: Fraction removed of all leaves together, in [0, 1).
        pattern: As in `uniform`.
        where: As in `uniform`.
        overrides: As in `uniform`; these leaves stay out of the pool.
        floor: As in `global_`.

    Returns:
        A distribution with an allocator, as `global_`.

    Raises:
        ValueError: As in `global_`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params = {"a": jnp.full((4, 4), 0.1), "b": jnp.full((4, 4), 10.0)}
        >>> _, masks = jsp.prune(params, jsp.lamp(0.5))
        >>> int(masks["a"].sum()) + int(masks["b"].sum())
        16

    Deviations: densities are computed from histograms of the upper 16 bits of the score (relative
    steps of 1/128); scores are meant to be at least zero, lower ones count as zero.

    References: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021,
    arXiv:2010.07611.
    """
    _check_floor(floor, sparsity)
    bins = 2**15  # the upper half of a float32 that is not negative

    def slice_lamp(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Units in each bin of magnitude, and the LAMP score of the bin as an ordered key."""
        scores = jnp.maximum(jnp.where(jnp.isnan(scores), 0, scores), 0)
        index = lax.bitcast_convert_type(scores, jnp.int32) >> 16
        tally = jnp.zeros(bins, jnp.int32).at[index].add(1, mode="promise_in_bounds")
        square = jnp.square(scores)
        total = jnp.zeros(bins, jnp.float32).at[index].add(square, mode="promise_in_bounds")
        tail = jnp.cumsum(total[::-1])[::-1]
        edge = lax.bitcast_convert_type(jnp.arange(bins, dtype=jnp.int32) << 16, jnp.float32)
        lamp_score = jnp.where(tally > 0, jnp.square(edge) / jnp.maximum(tail, 1e-38), 0)
        return tally, select.sort_key(lamp_score)

    def allocate(scores: list[Any], plan: Plan, share: Any) -> Counts:
        def survivors(i: int) -> Survivors:
            pattern, shape = plan.leaves[i].pattern, plan.shapes[i]
            gathered = pattern.gather(scores[i]).astype(jnp.float32) / _unit_size(pattern, shape)
            histogram = slice_lamp
            for _ in _lead(pattern, shape):
                histogram = jax.vmap(histogram)
            tally, key = histogram(gathered)
            return lambda t: jnp.sum(jnp.where(key >= t, tally, 0), -1, dtype=jnp.int32)

        return _allocate(plan, share, sparsity, floor, survivors)

    return Distribution(sparsity, pattern, where, dict(overrides or {}), allocate=allocate)


def _check_floor(floor: float, sparsity: float) -> None:
    check_sparsity(sparsity, "sparsity")
    if floor < 0 or floor + sparsity > 1:  # not 1 - sparsity: 1 - 0.8 is less than 0.2
        raise ValueError(
            f"floor is the least density of a leaf, between 0 and 1 - sparsity = {1 - sparsity:g}; "
            f"got {floor}."
        )


def _lead(pattern: Pattern, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[: len(shape) - getattr(pattern, "ndim", 2)]


def _unit_size(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """Weights in one unit."""
    gathered = jax.eval_shape(pattern.gather, jax.ShapeDtypeStruct(shape, jnp.float32))
    return math.prod(shape) // math.prod(gathered.shape)


def _allocate(
    plan: Plan, share: Any, sparsity: float, floor: float, survivors: Callable[[int], Survivors]
) -> Counts:
    """Units kept per group for each pooled leaf, such that all together meet the target."""
    pool = [i for i, pooled in enumerate(plan.pooled) if pooled]
    total = sum(math.prod(plan.shapes[i]) for i in pool)
    # Weights may be more than int32 holds; then the target is met up to float32.
    number = jnp.int32 if total < 2**31 else jnp.float32
    if isinstance(share, (int, float)):
        target = jnp.asarray(kept_units(1 - share * sparsity, total), number)
    else:
        final = jnp.asarray(kept_units(1 - sparsity, total), number)
        moving = jnp.round(jnp.float32(total) * (1 - share * sparsity)).astype(number)
        target = jnp.where(share >= 1, final, moving)

    leaves = []
    for i in pool:
        pattern, shape = plan.leaves[i].pattern, plan.shapes[i]
        lead = _lead(pattern, shape)
        size = _unit_size(pattern, shape)
        in_slice = math.prod(shape) // size // max(math.prod(lead), 1)
        least = max(1, round(floor * in_slice)) if in_slice else 0
        leaves.append((survivors(i), size, in_slice, least))

    def kept(threshold: jax.Array) -> list[jax.Array]:
        return [jnp.maximum(above(threshold), least) for above, _, _, least in leaves]

    def weights(counts: list[jax.Array]) -> jax.Array:
        parts = [
            jnp.sum(c.astype(number)) * leaf[1] for c, leaf in zip(counts, leaves, strict=True)
        ]
        return jnp.asarray(sum(parts), number)

    def decide(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold ^ (jnp.int32(1) << (31 - i))
        return jnp.where(weights(kept(candidate)) >= target, candidate, threshold)

    lowest = jnp.asarray(jnp.iinfo(jnp.int32).min, jnp.int32)
    threshold = lax.fori_loop(0, 32, decide, lowest)
    most, sure = kept(threshold), kept(threshold + 1)
    spare = jnp.maximum(target - weights(sure), 0)
    counts: Counts = [0] * len(plan.paths)
    for i, leaf, upper, lower in zip(pool, leaves, most, sure, strict=True):
        _, size, in_slice, _ = leaf
        tied = (upper - lower).reshape(-1)
        before = jnp.cumsum(tied) - tied
        taken = jnp.clip((spare // size).astype(jnp.int32) - before, 0, tied)
        spare = spare - jnp.sum(taken.astype(number)) * size
        in_group = units(plan.leaves[i].pattern, plan.shapes[i])
        count = lower + taken.reshape(lower.shape)
        if in_group != in_slice:  # FanIn: the same share in every group of the slice
            count = jnp.round(count.astype(jnp.float32) / in_slice * in_group).astype(jnp.int32)
        counts[i] = count
    return counts
