"""Mask decay: Bambhaniya et al., Progressive gradient flow for robust N:M sparsity, 2024."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._ste import STEState, ste, view_leaves
from jaxsparse.training._updater import MaskUpdater

Tree = Any


def mask_decay(
    distribution: Callable[[Tree], Plan],
    *,
    fade: Schedule,
    when: When | None = None,
    gated: bool = False,
) -> MaskUpdater:
    """Pruned weights fade instead of vanishing: the view is w * (m + d * (1 - m)).

    d = `fade(step)` falls from 1, a dense model, to 0, the masked one.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.9375, NM(1, 16))`.
        fade: Step -> d, 0 to 1, and 0 from the step on at which the model shall be sparse: the
            paper's are max(0, 1 - b t), `optax.linear_schedule(1, 0, 1 / b)`, and exp(-b t),
            `optax.exponential_decay(1, 1 / b, exp(-1))`, which never ends.
        when: Step -> whether its view gets fresh masks; None is every step.
        gated: Whether the gradient of a pruned weight is scaled by d too, as the view; else it
            passes straight through.

    Returns:
        A `MaskUpdater`; the weights stay dense. At the end take `view(params, state.updater)`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> fade = optax.linear_schedule(1, 0, 4)
        >>> updater = jsp.mask_decay(jsp.uniform(0.5), fade=fade)
        >>> params, state = {"w": jnp.array([[4.0, 2.0]])}, updater.init({"w": jnp.ones((1, 2))})
        >>> updater.view(params, state._replace(count=jnp.int32(3)))["w"]
        Array([[4. , 0.5]], dtype=float32)

    Cost: as `ste`.

    Deviations: checked against the authors' code, which passes the gradient straight through; the
    title's claim is that gradients should fade with the mask, hence `gated`. The paper's other
    half, structure decay, is `ste(distribution, schedule=halving(...))`; dense warm-up is
    `dense_when`.

    References: Bambhaniya et al., 2024, arXiv:2402.04744.
    """

    def view(params: Tree, state: STEState) -> Tree:
        d = jnp.asarray(fade(state.count), jnp.float32)

        def show(w: jax.Array, mask: jax.Array) -> jax.Array:
            return _fade(w, mask, d.astype(w.dtype), d.astype(w.dtype) if gated else None)

        return view_leaves(params, state.masks, show)

    return ste(distribution, when=when)._replace(view=view)


@jax.custom_jvp
def _fade(w: jax.Array, mask: jax.Array, d: jax.Array, gate: jax.Array | None) -> jax.Array:
    return jnp.where(mask, w, d * w)


@_fade.defjvp
def _fade_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    _, mask, _, gate = primals
    t = tangents[0]
    return _fade(*primals), t if gate is None else jnp.where(mask, t, gate * t)
