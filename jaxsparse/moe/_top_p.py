"""As many experts a token as it takes to reach a probability.

References: Yang et al., XMoE: Sparse models with fine-grained and adaptive expert selection, 2024,
arXiv:2403.18926.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.moe._routing import Router, Routing, balance_loss, check_choices, z_loss


def top_p(p: float, most: int, *, balance: float = 1e-2, z: float = 0.0) -> Router:
    """The fewest experts whose probabilities sum to `p` or more, at most `most` of them.

    Args:
        p: Probability to reach, in (0, 1].
        most: Choices a token has room for; beyond it the least probable ones are left out.
        balance: Factor of the load-balancing loss.
        z: Factor of the z-loss.

    Returns:
        A Router without state; unused choices have expert E and weight 0.

    Raises:
        ValueError: If p is not in (0, 1], or `most` not 1 to E (when routing).

    Example:
        >>> import jaxsparse as jsp
        >>> logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]))
        >>> jsp.moe.top_p(0.6, 3).route(logits, ()).experts.tolist()
        [[0, 3, 3], [0, 1, 3]]

    Cost: a top-k of T E logits.

    Deviations: weights are the probabilities themselves, as in the paper's softmax router; priority
        of larger probabilities under a capacity is `limited(..., by_weight=True)`.

    References: Yang et al., XMoE, 2024, arXiv:2403.18926.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p needs 0 < p <= 1; got {p}.")

    def route(logits: jax.Array, state: Any = (), **_: Any) -> Routing:
        number = logits.shape[-1]
        check_choices("top_p", most, number)
        logits = logits.astype(jnp.float32)
        probabilities = jax.nn.softmax(logits)
        weights, experts = jax.lax.top_k(probabilities, most)
        used = jnp.cumsum(weights, -1) - weights < p  # what came before has not reached p
        experts = jnp.where(used, experts, number).astype(jnp.int32)
        aux = balance * balance_loss(probabilities, experts) + z * z_loss(logits)
        return Routing(jnp.where(used, weights, 0), experts, aux)

    return Router(route)
