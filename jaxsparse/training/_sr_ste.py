"""SR-STE: Zhou et al., Learning N:M fine-grained structured sparse networks from scratch, 2021."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.plans import Plan
from jaxsparse.training._ste import STEState, ste
from jaxsparse.training._updater import MaskUpdater

Tree = Any


def sr_ste(distribution: Callable[[Tree], Plan], *, decay: float = 2e-4) -> MaskUpdater:
    """Straight-through estimation that pulls pruned weights to zero, so that masks settle.

    As `ste`, with the gradient g + decay * (1 - m) * w, which the inner optimizer sees.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.5, NM(2, 4))`.
        decay: Pull on pruned weights, at least 0.

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

    References: Zhou et al., 2021, arXiv:2102.04010.
    """
    if decay < 0:
        raise ValueError(f"decay pulls pruned weights to zero and must be >= 0; got {decay}.")

    def regularize(
        params: Tree, state: STEState, grads: Tree, updates: Tree | None
    ) -> tuple[Tree, Tree | None]:
        def of_leaf(g: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
            if not jnp.ndim(mask):
                return g
            return g + jnp.where(mask, 0, decay * w).astype(g.dtype)

        if updates is None:
            grads = jax.tree.map(of_leaf, grads, params, state.masks)
        return grads, updates

    return ste(distribution)._replace(regularize=regularize)
