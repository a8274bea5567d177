"""What a router says, what it costs, and what can be read off it.

Shape letters: T tokens, E experts, k choices a token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """Which experts see which tokens.

    Attributes:
        weights: float32 `[T, k]`, what the output of the expert is multiplied by; 0 where unused.
        experts: int32 `[T, k]`, 0 to E - 1, and E where the choice is not used.
        aux: float32 scalar, to be added to the loss.

    Example:
        >>> from jaxsparse.moe import Routing
        >>> one_each = Routing(jnp.ones((3, 1)), jnp.array([[0], [2], [1]]), jnp.zeros(()))
        >>> one_each.experts.shape  # tokens, choices
        (3, 1)
    """

    weights: jax.Array
    experts: jax.Array
    aux: jax.Array


class Statistics(NamedTuple):
    """How evenly tokens are spread.

    Attributes:
        load: float32 `[E]`, share of the used choices that fall on each expert; sums to 1.
        entropy: of the load over its largest value log E: 1 is even, 0 is a single expert.
        dropped: share of tokens that no expert sees.
        choices: experts a token, on average.

    Example:
        >>> from jaxsparse.moe import Routing, statistics
        >>> routing = Routing(jnp.ones((2, 1)), jnp.array([[0], [1]]), jnp.zeros(()))
        >>> float(statistics(routing, 2).entropy)
        1.0
    """

    load: jax.Array
    entropy: jax.Array
    dropped: jax.Array
    choices: jax.Array


class Router(NamedTuple):
    """A way to choose experts: pure functions, as an optimizer is.

    Attributes:
        route: `(logits [T, E], state, **evidence) -> Routing`. Evidence is by keyword, of a fixed
            vocabulary: `key` for what is drawn at random, `tokens` int `[T]` for hashing, `given`
            int `[T]` or `[T, k]` for experts known beforehand. A router ignores what it does not
            need; without `key` every one but `random` is deterministic.
        init: `experts -> state`; an empty tuple for most.
        update: `(state, Statistics) -> state`, once a step; give it the mean of the statistics over
            devices and micro-batches.

    Example:
        >>> from jaxsparse.moe import Router, Routing
        >>> def nearest_to_one(logits, state=(), **evidence):
        ...     weights, experts = jax.lax.top_k(-jnp.abs(logits - 1), 1)
        ...     return Routing(jnp.exp(weights), experts, jnp.zeros(()))
        >>> Router(nearest_to_one).route(jnp.array([[3.0, 1.5]]), ()).experts.tolist()
        [[1]]
    """

    route: Callable[..., Routing]
    init: Callable[[int], Any] = lambda experts: ()
    update: Callable[[Any, Statistics], Any] = lambda state, seen: state


def statistics(routing: Routing, experts: int) -> Statistics:
    """Load, entropy and drop rate of a routing.

    Example:
        >>> from jaxsparse.moe import Routing, statistics
        >>> routing = Routing(jnp.ones((2, 1)), jnp.array([[0], [2]]), jnp.zeros(()))
        >>> statistics(routing, 2).load.tolist(), float(statistics(routing, 2).dropped)
        ([1.0, 0.0], 0.5)
    """
    count = counts(routing, experts).astype(jnp.float32)
    load = count / jnp.maximum(count.sum(), 1)
    entropy = -jnp.sum(jnp.where(load > 0, load * jnp.log(jnp.maximum(load, 1e-30)), 0))
    used = routing.experts < experts
    return Statistics(
        load,
        entropy / jnp.log(jnp.maximum(experts, 2)),
        jnp.mean(~used.any(-1), dtype=jnp.float32),
        jnp.mean(used.sum(-1), dtype=jnp.float32),
    )


def counts(routing: Routing, experts: int) -> jax.Array:
    """How many tokens each expert sees: int32 `[E]`.

    Example:
        >>> from jaxsparse.moe import Routing, counts
        >>> counts(Routing(jnp.ones((2, 1)), jnp.array([[1], [1]]), jnp.zeros(())), 3).tolist()
        [0, 2, 0]
    """
    return jnp.sum(routing.experts[..., None] == jnp.arange(experts), (0, 1), dtype=jnp.int32)


def balance_loss(probabilities: jax.Array, experts: jax.Array) -> jax.Array:
    """E sum_e f_e p_e: least, 1, for even loads (Shazeer 2017; Fedus 2021, eq. 4).

    Args:
        probabilities: `[T, E]`; their mean p_e carries the gradient.
        experts: int `[T, k]`; f_e is the share of the choices that fall on e.

    Example:
        >>> from jaxsparse.moe import balance_loss
        >>> float(balance_loss(jnp.full((4, 2), 0.5), jnp.array([[0], [1], [0], [1]])))
        1.0
    """
    number = probabilities.shape[-1]
    chosen = jnp.sum(experts[..., None] == jnp.arange(number), 1, dtype=jnp.float32)
    share = chosen.mean(0) / jnp.maximum(chosen.sum(-1).mean(), 1e-30)
    return number * jnp.sum(share * probabilities.mean(0))


def z_loss(logits: jax.Array) -> jax.Array:
    """Mean of (log sum exp of the logits)^2, which keeps them small (Zoph 2022, eq. 5).

    Example:
        >>> from jaxsparse.moe import z_loss
        >>> float(z_loss(jnp.zeros((3, 1))))
        0.0
    """
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def limited(routing: Routing, experts: int, capacity: int, *, by_weight: bool = True) -> Routing:
    """The routing with at most `capacity` tokens an expert; choices beyond it are not used.

    Args:
        routing: Of any router.
        experts: E.
        capacity: Tokens an expert takes; ceil(factor * T * k / E) is usual.
        by_weight: Choices of larger weight go first, else first choices before second ones, and
            among equal ones the earlier token (batch-prioritised routing, Riquelme 2021).
            Priority by weight lets later tokens displace earlier ones: not causal.

    Example:
        >>> from jaxsparse.moe import Routing, limited
        >>> weights = jnp.array([[0.2], [0.9], [0.5]])
        >>> routing = Routing(weights, jnp.zeros((3, 1), jnp.int32), jnp.zeros(()))
        >>> limited(routing, 1, 2).experts.ravel().tolist()
        [1, 0, 0]

    Cost: one sort of T k numbers.
    """
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0 tokens an expert; got {capacity}.")
    t, k = routing.experts.shape
    # In order of importance: all first choices, then all second choices, and so on.
    flat, weights = routing.experts.T.ravel(), routing.weights.T.ravel()
    first = jnp.argsort(-weights, stable=True) if by_weight else jnp.arange(t * k)
    order = first[jnp.argsort(flat[first], stable=True)]  # by expert, then by importance
    sizes = counts(routing, experts)
    begin = jnp.concatenate([jnp.cumsum(sizes) - sizes, sizes.sum()[None]])
    rank = jnp.arange(t * k) - begin[jnp.minimum(flat[order], experts)]
    rank = jnp.zeros(t * k, jnp.int32).at[order].set(rank.astype(jnp.int32))
    keep = (rank < capacity).reshape(k, t).T & (routing.experts < experts)
    return routing._replace(
        weights=jnp.where(keep, routing.weights, 0),
        experts=jnp.where(keep, routing.experts, experts),
    )


def check_choices(name: str, k: int, experts: int) -> None:
    """Raise ValueError unless 1 <= k <= experts."""
    if not 1 <= k <= experts:
        raise ValueError(f"{name} needs 1 <= k <= experts; got k={k} of {experts} experts.")
