"""Each token takes its best experts.

References: Shazeer et al., Outrageously large neural networks, 2017, arXiv:1701.06538; Fedus et
al., Switch Transformers, 2021, arXiv:2101.03961; Zoph et al., ST-MoE, 2022, arXiv:2202.08906; Wang
et al., Auxiliary-loss-free load balancing, 2024, arXiv:2408.15664.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.moe._routing import (
    Router,
    Routing,
    Statistics,
    balance_loss,
    check_choices,
    z_loss,
)


def token_choice(
    k: int,
    *,
    normalize: bool = True,
    balance: float = 1e-2,
    z: float = 1e-3,
    jitter: float = 0.0,
    dropout: float = 0.0,
) -> Router:
    """The k experts of largest probability, p = softmax(logits).

    aux = balance * E sum_e f_e p_e + z * mean(logsumexp(logits)^2).

    Args:
        k: Experts a token.
        normalize: Weights are p over the sum of the k chosen (Mixtral), else p itself (Switch).
        balance: Factor of the load-balancing loss.
        z: Factor of the z-loss.
        jitter: Logits are multiplied by noise of [1 - jitter, 1 + jitter] where `key` is given.
        dropout: Share of experts that a step leaves out, for all its tokens, where `key` is given;
            never so many that fewer than k are left.

    Returns:
        A Router without state.

    Raises:
        ValueError: If k is not 1 to E (when routing), or a share not in [0, 1).

    Example:
        >>> import jaxsparse as jsp
        >>> routing = jsp.moe.token_choice(1).route(jnp.array([[0.0, 2.0], [3.0, 1.0]]), ())
        >>> routing.experts.ravel().tolist(), routing.weights.ravel().tolist()
        ([1, 0], [1.0, 1.0])

    Cost: a top-k of T E logits.

    Deviations: with jitter the noise meets the logits, not the input of the gate, whose other uses
        it then leaves alone.

    References: Shazeer et al., 2017, arXiv:1701.06538; Fedus et al., Switch Transformers, 2021,
    arXiv:2101.03961; Zoph et al., ST-MoE, 2022, arXiv:2202.08906.
    """
    _check_shares(jitter=jitter, dropout=dropout)

    def route(logits: jax.Array, state: Any = (), *, key: jax.Array | None = None, **_: Any):
        check_choices("token_choice", k, logits.shape[-1])
        logits = logits.astype(jnp.float32)
        choose = logits
        if key is not None and (jitter or dropout):
            noise, drop = jax.random.split(key)
            if jitter:
                choose = logits = logits * jax.random.uniform(
                    noise, logits.shape, minval=1 - jitter, maxval=1 + jitter
                )
            if dropout:
                choose = jnp.where(_kept(drop, logits.shape[-1], k, dropout), logits, -jnp.inf)
        p = jax.nn.softmax(choose)
        weights, experts = jax.lax.top_k(p, k)
        if normalize:
            weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        aux = balance * balance_loss(p, experts) + z * z_loss(logits)
        return Routing(weights, experts.astype(jnp.int32), aux)

    return Router(route)


def loss_free(k: int, *, rate: float = 1e-3, normalize: bool = True, scale: float = 1.0) -> Router:
    """Sigmoid scores, balanced by a bias that no gradient reaches.

    Experts are the top k of sigmoid(logits) + b; weights are sigmoid(logits) at them, so that the
    bias moves tokens but not outputs. Once a step b_e += rate * sign(mean load - load_e).

    Args:
        k: Experts a token.
        rate: Step of the bias.
        normalize: Divide the weights by their sum over the k chosen.
        scale: Times the weights.

    Returns:
        A Router whose state is the bias, float32 `[E]`.

    Raises:
        ValueError: If k is not 1 to E (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> router = jsp.moe.loss_free(1, rate=0.5)
        >>> seen = jsp.moe.statistics(router.route(jnp.array([[0.2, 0.0]]), router.init(2)), 2)
        >>> bias = router.update(router.init(2), seen)
        >>> bias.tolist(), router.route(jnp.array([[0.2, 0.0]]), bias).experts.tolist()
        ([-0.5, 0.5], [[1]])

    Cost: a top-k of T E scores, E numbers of state.

    References: Wang et al., 2024, arXiv:2408.15664; DeepSeek-V3, 2024, arXiv:2412.19437.
    """

    def route(logits: jax.Array, state: jax.Array, **_: Any) -> Routing:
        check_choices("loss_free", k, logits.shape[-1])
        scores = jax.nn.sigmoid(logits.astype(jnp.float32))
        experts = jax.lax.top_k(jax.lax.stop_gradient(scores) + state, k)[1]
        weights = jnp.take_along_axis(scores, experts, -1)
        if normalize:
            weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        return Routing(weights * scale, experts.astype(jnp.int32), jnp.zeros((), jnp.float32))

    def update(state: jax.Array, seen: Statistics) -> jax.Array:
        return state + rate * jnp.sign(seen.load.mean() - seen.load)

    return Router(route, lambda experts: jnp.zeros(experts, jnp.float32), update)


def _kept(key: jax.Array, experts: int, k: int, dropout: float) -> jax.Array:
    """Bool [E]: a random set of round((1 - dropout) E) experts, at least k."""
    count = max(k, round((1 - dropout) * experts))
    return jax.random.permutation(key, experts) < count


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is a share, 0 <= {name} < 1; got {value}.")
