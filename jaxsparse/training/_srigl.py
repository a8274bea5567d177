"""SRigL: Lasby et al., Dynamic Sparse Training with Structured Sparsity, 2023, arXiv:2305.02299."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _tree, select
from jaxsparse.patterns import FanIn, Pattern, Unstructured, kept_units, mask_of_count, units
from jaxsparse.plans import LeafPlan, Plan, Where
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._prune_and_grow import prune_and_grow
from jaxsparse.training._updater import MaskUpdater


def srigl(
    distribution: Callable[[Any], Plan],
    *,
    key: jax.Array,
    when: When,
    drop_fraction: float | Schedule = 0.3,
    least_salient: float = 0.3,
    ablate: Where | None = None,
) -> MaskUpdater:
    """RigL with as many inputs for every output, and outputs that are ablated.

    At each update a layer drops its smallest `drop_fraction` of kept weights, wherever they stand.
    Salient are the weights that stay and as many of largest |gradient| as were dropped. An output
    with fewer salient weights than `least_salient` of its k inputs is ablated: it loses all of
    them, and the others get k' = floor(budget / outputs left) inputs each, where the budget is what
    the plan keeps. Each output then keeps what stayed, at most its k' largest, and grows inputs of
    largest |gradient|. An ablated output comes back when it has enough salient weights.

    `formats.Condensed` stores the result for inference.

    Args:
        distribution: Parameters -> `Plan`, whose pruned leaves have the pattern `FanIn`.
        key: Random key of the first masks.
        when: Step -> whether to update, e.g. `every(100, stop=0.75 * steps)`.
        drop_fraction: Share of the kept weights to move, 0 to 1: a number, or a schedule such as
            `optax.cosine_decay_schedule(0.3, steps)`, which is the paper's.
        least_salient: Share of k below which an output is ablated, 0 to 1, the paper's gamma_sal;
            at least one salient weight. With 0 none is ablated.
        ablate: Which leaves may lose outputs: a glob over the path or `(path, leaf) -> bool`; all
            if not given. Leave out the last layer, whose outputs are what is asked for.

    Returns:
        A `MaskUpdater`; grown weights start at zero.

    Raises:
        ValueError: If `drop_fraction` or `least_salient` is a number outside [0, 1]; in `init`, if
            a leaf has another pattern, densities follow scores (`global_`, `lamp`), or `ablate`
            matches no leaf.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> plan, key = jsp.uniform(0.75, jsp.FanIn()), jax.random.key(0)
        >>> updater = jsp.srigl(plan, key=key, when=jsp.every(1), drop_fraction=0.5)
        >>> params = {"w": jnp.ones((8, 4)) * jnp.array([2.0, 2.0, 1.0, 1.0])}
        >>> tx = jsp.sparsify(optax.sgd(0.1), updater)
        >>> state = tx.update(params, tx.init(params), params)[1]
        >>> jsp.masks(state)["w"].sum(0)
        Array([4, 4, 0, 0], dtype=int32)

    Cost: masks of 1 byte a weight; five selections at each update.

    Deviations: from the authors' code: the step of an update also takes an optimizer step on the
    weights that stay; salience is counted against k, their option
    `use_sparse_const_fan_in_for_ablation`, as in the paper; where more than k' inputs of an output
    stay, the largest do, not the first; enough outputs stay, the most salient, to hold the budget.
    The bias of an ablated output goes on.

    References: Lasby et al., 2023, arXiv:2305.02299.
    """
    if not 0 <= least_salient <= 1:
        raise ValueError(
            f"least_salient is a share of the inputs of an output, 0 to 1; got {least_salient}."
        )

    def move(
        path: str,
        leaf: LeafPlan,
        mask: jax.Array,
        w: jax.Array,
        slopes: jax.Array,
        fraction: jax.Array,
    ) -> jax.Array:
        may = ablate is None or _tree.matches(ablate, path, w)
        rule = partial(_move, leaf, least_salient if may else 0.0)
        return _tree.in_auto_mode(rule, w, mask, slopes, fraction)

    def grow(path: str, w: jax.Array, grad: jax.Array, step: jax.Array) -> jax.Array:
        del path, w, step
        return jnp.abs(grad)

    updater = prune_and_grow(
        distribution, key=key, when=when, drop_fraction=drop_fraction, grow=grow, move=move
    )

    def init(params: Any) -> Any:
        _check(distribution, params, ablate)
        return updater.init(params)

    return updater._replace(init=init)


def _move(
    leaf: LeafPlan,
    least_salient: float,
    w: jax.Array,
    mask: jax.Array,
    slopes: jax.Array,
    fraction: jax.Array,
) -> jax.Array:
    """The mask after one update."""
    pattern, fan_in, outputs = leaf.pattern, units(leaf.pattern, w.shape), w.shape[-1]
    layer = Unstructured(len(pattern.axes) + 1)
    k = int(kept_units(leaf.density, fan_in))
    sizes, none = jnp.abs(w), jnp.asarray(-jnp.inf, w.dtype)

    def largest(among: jax.Array, pattern: Pattern, count: jax.Array) -> jax.Array:
        return among & mask_of_count(pattern, jnp.where(among, sizes, none), count)

    held = select.count_true(mask, layer.axes)
    stay = held - jnp.round(fraction * held).astype(jnp.int32)
    salient = largest(mask, layer, stay) | mask_of_count(layer, slopes, held - stay)
    salience = select.count_true(salient, pattern.axes)  # [..., 1, N]
    active = salience >= (max(1, math.floor(least_salient * k)) if least_salient else 0)
    enough = -(-k * outputs // fan_in)  # fewer outputs cannot hold the budget
    active = active | select.keep_top(salience, enough, (-1,))
    left = jnp.maximum(1, select.count_true(active, (-1,)))
    count = jnp.where(active, jnp.minimum(fan_in, k * outputs // left), 0)
    stays = largest(largest(mask & active, layer, stay), pattern, count)
    most = jnp.asarray(jnp.inf, slopes.dtype)
    return mask_of_count(pattern, jnp.where(stays, most, slopes), count)


def _check(distribution: Callable[[Any], Plan], params: Any, ablate: Where | None) -> None:
    if getattr(distribution, "allocate", None) is not None:
        raise ValueError(
            "srigl needs to know from shapes how many inputs an output keeps; global_ and lamp "
            "follow the scores. Use uniform or erk."
        )
    plan = distribution(params)
    for path, leaf in zip(plan.paths, plan.leaves, strict=True):
        if leaf.sparsity and not isinstance(leaf.pattern, FanIn):
            raise ValueError(
                f"{path} is planned with {leaf.pattern}, but srigl keeps as many inputs for every "
                "output. Plan it with FanIn(), or exclude it with where=."
            )
    leaves = jax.tree.leaves(params)
    if leaves and ablate is not None:
        if not any(_tree.matches(ablate, p, x) for p, x in zip(plan.paths, leaves, strict=True)):
            raise _tree.unmatched(ablate, plan.paths, "ablate=")
