"""SR-STE: Zhou et al., Learning N:M fine-grained structured sparse networks from scratch, 2021."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxsparse.plans import Plan
from jaxsparse.schedules import Schedule, When
from jaxsparse.training._ste import STEState, ste
from jaxsparse.training._updater import MaskUpdater

Tree = Any
Decay = float | jax.Array | Schedule


def sr_ste(
    distribution: Callable[[Tree], Plan],
    *,
    decay: Decay = 2e-4,
    when: When | None = None,
    schedule: Schedule | None = None,
    decoupled: bool = False,
) -> MaskUpdater:
    """Straight-through estimation that pulls pruned weights to zero, so that masks settle.

    As `ste`, with the gradient g + decay * (1 - m) * w, which the inner optimizer sees: the pull
    comes before its moments. Decoupled, it comes after them: w <- w + update - decay * (1 - m) * w.
    For a pull inside the second moment but not the first, use `ste` with `masked_adam`.

    Pre-training at 2:4 as of Hu et al. is `dense_when(sr_ste(uniform(0.5, TransposableNM(2, 4)),
    decay=6e-5, when=every(40)), lambda step: step >= 5 / 6 * steps)`, with `nm_matmul` for the
    gradients and `choose_decay` for the pull.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.5, NM(2, 4))`.
        decay: Pull on pruned weights, at least 0: a number, traced or not, or a schedule.
        when: Step -> whether its view gets fresh masks; None is every step.
        schedule: Step -> share of the final sparsity; see `ste`.
        decoupled: Pull after the inner optimizer, by `decay` itself rather than times the learning
            rate.

    Returns:
        A `MaskUpdater`; the weights stay dense. At the end take `view(params, state.updater)`.

    Raises:
        ValueError: If decay is negative.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> updater = jsp.sr_ste(jsp.uniform(0.5), decay=0.1)
        >>> tx, params = jsp.sparsify(optax.sgd(1.0), updater), {"w": jnp.array([[4.0, 1.0]])}
        >>> tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)[0]["w"]
        Array([[-0. , -0.1]], dtype=float32)

    Cost: as `ste`.

    Deviations: none for the update, which is that of the authors' code and of Hu et al.'s (there
    also before the moments, and after clipping: so put no clipping into `inner`, but clip the
    gradients that you give to `tx.update`).

    References: Zhou et al., 2021, arXiv:2102.04010; for pre-training with transposable masks Hu et
    al., Accelerating transformer pre-training with 2:4 sparsity, 2024, arXiv:2404.01847.
    """
    decay_at = decay_schedule(decay, "pulls pruned weights to zero")

    def regularize(
        params: Tree, state: STEState, grads: Tree, updates: Tree | None
    ) -> tuple[Tree, Tree | None]:
        pull = decay_at(state.count)

        def of_leaf(x: jax.Array, w: jax.Array, mask: jax.Array, sign: int) -> jax.Array:
            if not jnp.ndim(mask):
                return x
            term = jnp.where(mask, jnp.zeros((), w.dtype), sign * pull.astype(w.dtype) * w)
            return x + term.astype(x.dtype)

        def add(tree: Tree, sign: int) -> Tree:
            return jax.tree.map(
                lambda x, w, mask: of_leaf(x, w, mask, sign), tree, params, state.masks
            )

        if updates is None:
            return (grads, None) if decoupled else (add(grads, 1), None)
        return grads, (add(updates, -1) if decoupled else updates)

    return ste(distribution, when=when, schedule=schedule)._replace(regularize=regularize)


def decay_schedule(decay: Decay, what: str) -> Callable[[jax.Array], jax.Array]:
    """Step -> strength, float32; ValueError for a negative number."""
    if callable(decay):
        return lambda step: jnp.asarray(decay(step), jnp.float32)
    if not isinstance(decay, Tracer) and not decay >= 0:
        raise ValueError(f"decay {what} and must be >= 0; got {decay}.")
    return lambda step: jnp.asarray(decay, jnp.float32)
