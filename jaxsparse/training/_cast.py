"""CAST: Huang et al., Continuous and differentiable semi-structured training, 2025."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When, every
from jaxsparse.training._sr_ste import decay_schedule
from jaxsparse.training._ste import STEState, ste
from jaxsparse.training._updater import MaskUpdater, identity_view

Tree = Any


def cast(
    distribution: Callable[[Tree], Plan],
    *,
    decay: float | jax.Array | Schedule,
    when: When | None = None,
) -> MaskUpdater:
    """A dense model that shrinks into its mask: no mask in the forward pass, L1 decay off it.

    After the inner optimizer, and so after its moments, every entry off the mask moves by the same
    amount towards zero and stops there: w <- soft(w + update, decay(t)) where m = 0. A weight that
    grows past a kept one takes its place at the next choice of masks.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.5, NM(2, 4))`.
        decay: How far an entry off the mask moves in one step, at least 0: a schedule that rises,
            or a number. This is the learning rate times the strength of an L1 penalty.
        when: Step -> whether masks are chosen anew; None is every 10 steps, as in the paper.

    Returns:
        A `MaskUpdater` whose view is the weights themselves; when what is off the masks is near
        zero take `apply_masks(params, masks(state))`.

    Raises:
        ValueError: If decay is a negative number.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.cast(jsp.uniform(0.5, jsp.NM(2, 4, axis=-1)), decay=0.25)
        >>> tx = jsp.sparsify(optax.adam(0.0), updater)
        >>> params = {"w": jnp.array([[4, -3, 1, -0.1]])}
        >>> updates, _ = tx.update({"w": jnp.ones((1, 4))}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[ 4.  , -3.  ,  0.75,  0.  ]], dtype=float32)

    Cost: masks of 1 byte a weight, a selection when due, a pass over the updates.

    Deviations: the abstract and summaries of the paper were read, no code. The paper's AdamS
    scales L1 decay so that Adam's step sizes do not make it uneven; its exact scaling is not known
    to us, and here all entries move by one amount, for any optimizer. Decay stops at zero, so that
    no entry swings about it. The learnable scale that makes up for lost magnitude is a parameter of
    the model, and the dense teacher a part of the loss; both are left to the caller.

    References: Huang et al., 2025, arXiv:2509.25996.
    """
    decay_at = decay_schedule(decay, "moves entries off the mask to zero")

    def regularize(
        params: Tree, state: STEState, grads: Tree, updates: Tree | None
    ) -> tuple[Tree, Tree | None]:
        if updates is None:
            return grads, None
        step = decay_at(state.count)

        def of_leaf(u: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
            if not jnp.ndim(mask):
                return u
            moved = (w + u.astype(w.dtype)).astype(jnp.float32)
            shrunk = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - step, 0)
            return jnp.where(mask, u, (shrunk - w.astype(jnp.float32)).astype(u.dtype))

        return grads, jax.tree.map(of_leaf, updates, params, state.masks)

    base = ste(distribution, when=every(10) if when is None else when)
    return base._replace(view=identity_view, regularize=regularize)
