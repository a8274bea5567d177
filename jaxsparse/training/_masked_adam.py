"""AST's Adam: Huang et al., Pruning LLMs with semi-structural adaptive sparse training, 2024."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse._masks import is_hidden
from jaxsparse.training._sr_ste import Decay, decay_schedule

Tree = Any


class MaskedAdamState(NamedTuple):
    """State of `masked_adam`: steps taken (int32), first and second moments."""

    count: jax.Array
    mu: Tree
    nu: Tree


def masked_adam(
    *, decay: Decay, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam that pulls pruned weights to zero outside its first moment and inside its second.

    mu <- b1 mu + (1 - b1) g;  d = mu + decay(t) (1 - m) w;  nu <- b2 nu + (1 - b2) d^2;
    update = d / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps). A direction, as of
    `optax.scale_by_adam`: chain it with a learning rate.

    Inside `sparsify`, which hands it the masks; with `ste`:
    `sparsify(optax.chain(masked_adam(decay=ramp), optax.scale_by_learning_rate(1e-4)), ste(plan,
    when=every(10)))`.

    Args:
        decay: Pull on pruned weights, at least 0: a number or a schedule; the paper ramps it up,
            `optax.linear_schedule(0, 6e-5, steps)`.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the denominator.

    Returns:
        A gradient transformation. Its `update` needs the parameters and the extra argument `masks`.

    Raises:
        ValueError: If decay is negative; in `update`, without parameters or masks.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> adam = optax.chain(jsp.masked_adam(decay=0.5), optax.scale_by_learning_rate(0.1))
        >>> tx = jsp.sparsify(adam, jsp.ste(jsp.uniform(0.5)))
        >>> params = {"w": jnp.array([[4.0, 1.0]])}
        >>> updates, _ = tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)
        >>> bool(updates["w"][0, 0] == 0), bool(updates["w"][0, 1] < 0)
        (True, True)

    Cost: that of Adam.

    Deviations: the formula was checked against the authors' optimizer, but for a slip there: it
    inverts an integer mask bit by bit, which is -1 and -2 instead of 0 and 1. Leaves without a mask
    get plain Adam, whose second moment takes g^2 rather than mu^2; decoupled weight decay is
    `optax.add_decayed_weights` after this. The teacher's KL is a part of the loss.

    References: Huang et al., 2024, arXiv:2407.20584.
    """
    decay_at = decay_schedule(decay, "pulls pruned weights to zero")

    def init(params: Tree) -> MaskedAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return MaskedAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        masks: Tree | None = None,
        **extra: Any,
    ) -> tuple[Tree, MaskedAdamState]:
        del extra
        if params is None or masks is None:
            raise ValueError(
                "masked_adam needs parameters and masks: use it inside jsp.sparsify, or call "
                "update(grads, state, params, masks=masks)."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        pull = decay_at(state.count)
        one, two = 1 - b1**count, 1 - b2**count

        def mean(g: jax.Array, mu: jax.Array) -> jax.Array:
            return (b1 * mu + (1 - b1) * g).astype(mu.dtype)

        def pulled(mu: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
            return mu + jnp.where(mask, 0, pull.astype(mu.dtype) * w.astype(mu.dtype))

        def square(g: jax.Array, d: jax.Array, nu: jax.Array, mask: jax.Array) -> jax.Array:
            s = d if jnp.ndim(mask) else g.astype(nu.dtype)
            return (b2 * nu + (1 - b2) * s * s).astype(nu.dtype)

        def ratio(d: jax.Array, nu: jax.Array) -> jax.Array:
            return d / one.astype(d.dtype) / (jnp.sqrt(nu / two.astype(nu.dtype)) + eps)

        masks = jax.tree.map(
            lambda g, m: g if is_hidden(g) else m, updates, masks, is_leaf=is_hidden
        )
        mu = jax.tree.map(mean, updates, state.mu)
        d = jax.tree.map(pulled, mu, params, masks)
        nu = jax.tree.map(square, updates, d, state.nu, masks)
        return jax.tree.map(ratio, d, nu), MaskedAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
