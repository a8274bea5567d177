"""Each expert takes its best tokens.

References: Zhou et al., Mixture-of-experts with expert choice routing, 2022, arXiv:2202.09368.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.moe._routing import Router, Routing, Statistics, check_choices


def expert_choice(factor: float, *, most: int | None = None) -> Router:
    """Every expert takes the C = round(factor * T / E) tokens of largest probability.

    Perfectly balanced without a loss. Which tokens an expert takes depends on all tokens of the
    call: in a decoder a later token can displace an earlier one, and generation token by token
    chooses differently. For causal models use `threshold_choice`.

    Args:
        factor: Experts a token, on average.
        most: Choices a token has room for, E if not given; beyond it those of least weight are
            left out.

    Returns:
        A Router without state; weights are p = softmax(logits) over the experts.

    Raises:
        ValueError: If factor <= 0, or `most` not 1 to E (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> logits = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> jsp.moe.expert_choice(0.67).route(logits, ()).experts.tolist()
        [[0, 2], [2, 2], [1, 2]]

    Cost: a top-k of E rows of T, and one of T rows of E.

    References: Zhou et al., 2022, arXiv:2202.09368.
    """
    _check_factor("expert_choice", factor)

    def route(logits: jax.Array, state: Any = (), **_: Any) -> Routing:
        t, experts = logits.shape
        p = jax.nn.softmax(logits.astype(jnp.float32))
        count = min(t, max(1, round(factor * t / experts)))
        tokens = jax.lax.top_k(p.T, count)[1]  # [E, C]
        chosen = jnp.zeros((experts, t), bool).at[jnp.arange(experts)[:, None], tokens].set(True)
        return _of_map(p, chosen.T, experts if most is None else most)

    return Router(route)


def threshold_choice(factor: float, *, most: int | None = None, rate: float = 1e-2) -> Router:
    """Expert choice that looks at no other token: an expert takes what exceeds its threshold.

    Expert e takes token t where p_te > theta_e. Once a step log theta_e += rate * sign(share_e -
    factor / E), share_e being the share of tokens that the expert took, so that each comes to take
    as many as in `expert_choice`. Causal, and the same in training and generation.

    Args:
        factor: Experts a token, on average.
        most: As for `expert_choice`.
        rate: Step of the thresholds.

    Returns:
        A Router whose state is log theta, float32 `[E]`; it starts at even odds, log 1/E.

    Raises:
        ValueError: If factor <= 0, or `most` not 1 to E (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> router = jsp.moe.threshold_choice(1.0)
        >>> router.route(jnp.array([[2.0, 0.0], [0.0, 1.0]]), router.init(2)).experts.tolist()
        [[0, 2], [1, 2]]

    Cost: a top-k of T rows of E.

    Deviations: the paper names causality as a limit and gives no such variant; this one is ours.

    References: the idea of expert choice: Zhou et al., 2022, arXiv:2202.09368.
    """
    _check_factor("threshold_choice", factor)

    def route(logits: jax.Array, state: jax.Array, **_: Any) -> Routing:
        experts = logits.shape[-1]
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return _of_map(jnp.exp(log_p), log_p > state, experts if most is None else most)

    def update(state: jax.Array, seen: Statistics) -> jax.Array:
        share = seen.load * seen.choices
        return state + rate * jnp.sign(share - factor / share.shape[-1])

    return Router(route, lambda experts: jnp.full(experts, -math.log(experts), jnp.float32), update)


def _of_map(p: jax.Array, chosen: jax.Array, most: int) -> Routing:
    """The routing of a map bool [T, E] of chosen pairs with weights p."""
    experts = p.shape[-1]
    check_choices("expert choice", most, experts)
    weights, index = jax.lax.top_k(jnp.where(chosen, p, -1.0), most)
    used = weights >= 0
    index = jnp.where(used, index, experts).astype(jnp.int32)
    return Routing(jnp.where(used, weights, 0), index, jnp.zeros((), jnp.float32))


def _check_factor(name: str, factor: float) -> None:
    if factor <= 0:
        raise ValueError(f"{name} needs factor > 0 experts a token; got {factor}.")
