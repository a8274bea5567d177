"""Fewer experts: what each is worth on some data, which to keep or merge, and smaller parameters.

References: Chen et al., Task-specific expert pruning for sparse mixture-of-experts, 2022,
arXiv:2206.00277; Lasby et al., REAP the experts, 2025, arXiv:2510.13999; Sarkar et al., Revisiting
SMoE language models by evaluating inefficiencies with task specific expert pruning (UNCURL), 2024,
arXiv:2409.01483.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxsparse._tree import path_str, paths, unmatched
from jaxsparse.moe._dispatch import collect, dispatch, spread
from jaxsparse.moe._routing import Router, Routing

Tree = Any


class Usage(NamedTuple):
    """Sums over tokens; add those of several batches, leaf by leaf.

    Attributes:
        tokens: float32, how many tokens were seen.
        hits: float32 `[E]`, how many of them chose the expert.
        weight: float32 `[E]`, sum of their routing weights.
        output: float32 `[E]`, sum of weight times the norm of the expert's output.

    Example:
        >>> from jaxsparse.moe import Usage
        >>> batch = Usage(jnp.array(2.0), jnp.array([2.0, 0.0]), jnp.ones(2), jnp.ones(2))
        >>> jax.tree.map(jnp.add, batch, batch).hits.tolist()
        [4.0, 0.0]
    """

    tokens: jax.Array
    hits: jax.Array
    weight: jax.Array
    output: jax.Array


def usage(
    x: jax.Array,
    routing: Routing,
    experts: int,
    run: Callable[[jax.Array, jax.Array], jax.Array],
) -> Usage:
    """What each expert does for the tokens x `[T, D]`; arguments as for `apply_experts`.

    Example:
        >>> import jaxsparse as jsp
        >>> routing = jsp.moe.token_choice(1).route(jnp.array([[0.0, 1.0]]), ())
        >>> seen = jsp.moe.usage(jnp.array([[3.0, 4.0]]), routing, 2, lambda rows, sizes: rows)
        >>> seen.hits.tolist(), seen.output.tolist()
        ([0.0, 1.0], [0.0, 5.0])

    Cost: that of `apply_experts`.
    """
    plan = dispatch(routing, experts)
    out = collect(run(spread(x, plan), plan.sizes), plan)
    norm = jnp.linalg.norm(out.astype(jnp.float32), axis=-1)
    chosen = (routing.experts[..., None] == jnp.arange(experts)).astype(jnp.float32)
    weighted = chosen * routing.weights[..., None]
    return Usage(
        jnp.asarray(x.shape[0], jnp.float32),
        chosen.sum((0, 1)),
        weighted.sum((0, 1)),
        (weighted * norm[..., None]).sum((0, 1)),
    )


def proficiency(seen: Usage) -> jax.Array:
    """Mean routing weight plus hit rate, over all tokens (task-specific expert pruning): [..., E].

    Example:
        >>> from jaxsparse.moe import Usage, proficiency
        >>> proficiency(Usage(jnp.array(4.0), jnp.array([2.0]), jnp.array([1.0]), jnp.ones(1)))
        Array([0.75], dtype=float32)

    References: Chen et al., Task-specific expert pruning, 2022, arXiv:2206.00277.
    """
    return (seen.weight + seen.hits) / jnp.maximum(seen.tokens[..., None], 1)


def expert_saliency(seen: Usage) -> jax.Array:
    """Mean of weight times output norm over the tokens that chose the expert (REAP): [..., E].

    Example:
        >>> from jaxsparse.moe import Usage, expert_saliency
        >>> expert_saliency(Usage(jnp.array(4.0), jnp.array([2.0]), jnp.ones(1), jnp.array([3.0])))
        Array([1.5], dtype=float32)

    References: Lasby et al., REAP the experts, 2025, arXiv:2510.13999.
    """
    return seen.output / jnp.maximum(seen.hits, 1)


def among(router: Router) -> Router:
    """A router that chooses among the experts that are alive; dead ones never run.

    Its state is (state of the router, alive bool [E]). With scanned layers `alive` is [L, E], so
    that every layer may keep another number. A token gets fewer choices where fewer are alive.

    Example:
        >>> import jaxsparse as jsp
        >>> router = jsp.moe.among(jsp.moe.token_choice(1))
        >>> inner, _ = router.init(2)
        >>> logits, alive = jnp.array([[2.0, 0.0]]), jnp.array([False, True])
        >>> router.route(logits, (inner, alive)).experts.tolist()
        [[1]]
    """

    def route(logits: jax.Array, state: Any, **evidence: Any) -> Routing:
        inner, alive = state
        # Finite, so that a softmax over dead experts alone is not NaN.
        masked = jnp.where(alive, logits, -1e9)
        routing = router.route(masked, inner, **evidence)
        lives = jnp.append(alive, False)[routing.experts]
        return routing._replace(
            weights=jnp.where(lives, routing.weights, 0),
            experts=jnp.where(lives, routing.experts, alive.shape[0]),
        )

    return Router(
        route,
        lambda experts: (router.init(experts), jnp.ones(experts, bool)),
        lambda state, seen: (router.update(state[0], seen), state[1]),
    )


def survivors(scores: jax.Array, alive: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Which experts stay alive: those of at least `threshold` of the best one's score.

    Call it at the end of each window of fine-tuning with a rising threshold, and with 1 to end with
    the single best expert of every layer: task-specific expert pruning.

    Args:
        scores: `[..., E]`, such as `proficiency` of the window.
        alive: bool `[..., E]`.
        threshold: Share of the largest score among the living, 0 to 1.

    Returns:
        bool `[..., E]`; of each layer at least one, the first of equally good ones.

    Example:
        >>> import jaxsparse as jsp
        >>> alive = jnp.ones(3, bool)
        >>> jsp.moe.survivors(jnp.array([0.1, 0.5, 0.9]), alive, 0.5).tolist()
        [False, True, True]

    Deviations: the paper gives no threshold; here it is relative, so that it means the same for
        every number of experts.

    References: Chen et al., Task-specific expert pruning, 2022, arXiv:2206.00277.
    """
    scores = jnp.where(alive, scores, -jnp.inf)
    best = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=bool)
    enough = scores >= threshold * scores.max(-1, keepdims=True)
    single = jnp.asarray(threshold) >= 1
    return alive & (best | (enough & ~single))


def take_experts(params: Tree, keep: jax.Array, axes: Mapping[str, int]) -> Tree:
    """Parameters with the experts `keep` alone, in that order.

    Args:
        params: Any tree.
        keep: int `[E']`, or `[..., E']` for stacked layers: experts of each layer, as many in each.
        axes: Path of a leaf -> its axis of experts, such as {"layers/moe/up": -3,
            "layers/moe/router/kernel": -1}; other leaves stay as they are.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: If a path does not exist, or an expert is out of range.

    Example:
        >>> import jaxsparse as jsp
        >>> params = {"up": jnp.arange(3.0)}
        >>> jsp.moe.take_experts(params, jnp.array([2, 0]), {"up": -1})["up"].tolist()
        [2.0, 0.0]

    Cost: one copy of what is kept.
    """
    _check_axes(params, axes)
    number = keep.shape[-1]

    def take(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_str(path)
        if name not in axes:
            return leaf
        axis = axes[name] % leaf.ndim
        _check_range(name, keep, leaf.shape[axis])
        index = keep.reshape(*keep.shape[:-1], *(1,) * (axis - keep.ndim + 1), number)
        index = index.reshape(*index.shape, *(1,) * (leaf.ndim - axis - 1))
        return jnp.take_along_axis(leaf, index, axis)

    return jax.tree_util.tree_map_with_path(take, params)


def merge_experts(
    params: Tree, groups: jax.Array, count: int, weights: jax.Array, axes: Mapping[str, int]
) -> Tree:
    """Parameters in which the experts of each group are one, their weighted mean.

    Args:
        params: Any tree.
        groups: int `[..., E]`, the group of each expert, 0 to count - 1, none of them empty.
        count: E', groups of a layer.
        weights: `[..., E]`, such as `Usage.hits`; experts of a group without any count alike.
        axes: As for `take_experts`.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: If a path does not exist.

    Example:
        >>> import jaxsparse as jsp
        >>> up, groups = {"up": jnp.array([1.0, 3.0, 5.0])}, jnp.array([0, 0, 1])
        >>> jsp.moe.merge_experts(up, groups, 2, jnp.ones(3), {"up": -1})["up"].tolist()
        [2.0, 5.0]

    Cost: one product [E', E] with every leaf.
    """
    _check_axes(params, axes)
    member = (groups[..., None] == jnp.arange(count)).astype(jnp.float32)  # [..., E, E']
    shares = member * jnp.maximum(weights, 1e-9)[..., None]
    shares = shares / jnp.maximum(shares.sum(-2, keepdims=True), 1e-30)

    def merge(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_str(path)
        if name not in axes:
            return leaf
        axis, lead = axes[name] % leaf.ndim, groups.ndim - 1
        moved = jnp.moveaxis(leaf, axis, -1).astype(jnp.float32)
        mix = shares.reshape(
            *shares.shape[:lead], *(1,) * (moved.ndim - 1 - lead), *shares.shape[lead:]
        )
        merged = jnp.matmul(moved[..., None, :], mix, precision="highest")[..., 0, :]
        return jnp.moveaxis(merged, -1, axis).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(merge, params)


def alike(logits: jax.Array, count: int) -> np.ndarray:
    """Groups of experts that the router treats alike: int `[E]`, 0 to count - 1 (UNCURL).

    Experts whose logits correlate most over the tokens of a task are joined, group by group, by the
    mean correlation between their members (average linkage). On the host.

    Args:
        logits: `[T, E]` on data of the task.
        count: Groups to end with, 1 to E.

    Example:
        >>> import jaxsparse as jsp
        >>> logits = jnp.array([[1.0, 0.9, 0.0], [0.0, 0.1, 1.0], [1.0, 1.0, 0.5]])
        >>> jsp.moe.alike(logits, 2).tolist()
        [0, 0, 1]

    Cost: E^3 host operations.

    Deviations: the rule of the paper is not in what we could read of it; this one is ours.

    References: Sarkar et al., UNCURL, 2024, arXiv:2409.01483.
    """
    z = np.asarray(logits, np.float64)
    experts = z.shape[1]
    if not 1 <= count <= experts:
        raise ValueError(f"alike needs 1 <= count <= {experts} experts; got {count}.")
    z = z - z.mean(0)
    z /= np.maximum(np.linalg.norm(z, axis=0), 1e-30)
    likeness = z.T @ z
    groups = [[e] for e in range(experts)]
    while len(groups) > count:
        pairs = ((a, b) for a in range(len(groups)) for b in range(a + 1, len(groups)))
        a, b = max(pairs, key=lambda p: likeness[np.ix_(groups[p[0]], groups[p[1]])].mean())
        groups[a] += groups.pop(b)
    found = np.zeros(experts, np.int32)
    for number, members in enumerate(sorted(groups, key=min)):
        found[members] = number
    return found


def _check_axes(params: Tree, axes: Mapping[str, int]) -> None:
    names = paths(params)
    for name in axes:
        if name not in names:
            raise unmatched(name, names, "axes")


def _check_range(name: str, keep: jax.Array, experts: int) -> None:
    if not isinstance(keep, Tracer) and np.any((keep < 0) | (keep >= experts)):
        raise ValueError(f"{name} has experts 0 to {experts - 1}; keep is {np.asarray(keep)}.")
