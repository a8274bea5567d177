"""WGSEF: Refael et al., k-level structured sparsity by group envelope regularization, 2022."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsparse import _tree
from jaxsparse.patterns import Pattern, kept_units, units
from jaxsparse.plans import Plan

Tree = Any


def group_envelope_prox(
    pattern: Pattern, w: jax.Array, density: float, strength: jax.Array | float
) -> jax.Array:
    """Proximal step of the convex envelope of |x|^2 / 2 with at most k groups that are not zero.

    The envelope is min over u of 1/2 sum |x_g|^2 / u_g, with 0 <= u_g <= 1 and sum u_g <= k. Its
    proximal map at v with factor lambda is x_g = v_g u_g / (u_g + lambda), where u_g =
    clip(s |v_g| - lambda, 0, 1) and s is such that the u_g add up to k: the largest groups shrink
    by 1 / (1 + lambda), small ones vanish.

    Args:
        pattern: Units are the groups: `Block`, `Channel`, `Unstructured`, ...
        w: `[..., K, N]`, v.
        density: k = round(density * units) groups.
        strength: lambda, above 0.

    Returns:
        The shape and dtype of `w`. At least k groups stay, if there are as many; where the step is
        repeated all others die out.

    Raises:
        ValueError: If the strength is not above 0, or the shape does not fit.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> w = jnp.array([[4.0, 2.0, 0.25, 0.25]])
        >>> jsp.group_envelope_prox(jsp.Unstructured(), w, 0.5, 1.0)
        Array([[2., 1., 0., 0.]], dtype=float32)

    Cost: 50 passes over the norms of the groups (bisection), three over w.

    Deviations: all groups weigh alike. The map was derived from the envelope and is tested against
    a solver; the paper's search for s takes linear time.

    References: Refael et al., Learning k-level structured sparse neural networks using group
    envelope regularization, 2022, arXiv:2212.12921.
    """
    if isinstance(strength, (int, float)) and not strength > 0:
        raise ValueError(
            f"strength is the factor of a proximal step and must be > 0; got {strength}."
        )
    count = kept_units(density, units(pattern, w.shape))
    return _tree.in_auto_mode(lambda w: _prox(pattern, w, count, strength), w)


def _prox(pattern: Pattern, w: jax.Array, count: Any, strength: Any) -> jax.Array:
    wide = w.astype(jnp.float32)
    norms = jnp.sqrt(pattern.gather(wide * wide))
    axes = pattern.axes
    norms = norms.astype(jnp.float32)
    positive = norms > 0

    def level(s: jax.Array) -> jax.Array:
        return jnp.where(positive, jnp.clip(s * norms - strength, 0, 1), 0)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low * jnp.sqrt(high / low)  # s spans many orders of magnitude
        enough = jnp.sum(level(middle), axes, keepdims=True) >= count
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    largest = jnp.max(norms, axes, keepdims=True)
    smallest = jnp.min(jnp.where(positive, norms, jnp.inf), axes, keepdims=True)
    some = largest > 0
    ends = (
        strength / jnp.where(some, largest, 1),
        (1 + strength) / jnp.where(some, smallest, 1),
    )
    _, s = lax.fori_loop(0, 50, halve, ends)  # the upper end: all groups there are, or enough
    u = pattern.scatter(level(s), w.shape)
    return (wide * (u / (u + strength))).astype(w.dtype)


def group_envelope(
    distribution: Callable[[Tree], Plan], *, strength: float
) -> optax.GradientTransformation:
    """Proximal gradient descent to a preset number of groups, for any optimizer.

    Put it last: `optax.chain(optax.sgd(0.1), group_envelope(plan, strength=0.01))`. The update u
    becomes prox(w + u) - w.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.5, Channel(-1))`.
        strength: Learning rate times the strength of the regularizer, above 0.

    Returns:
        A gradient transformation without state; its `update` needs the parameters.

    Raises:
        ValueError: If the strength is not above 0; in `update`, without parameters.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> tx = optax.chain(optax.sgd(0.1), jsp.group_envelope(jsp.uniform(0.5), strength=1.0))
        >>> params = {"w": jnp.array([[4.0, 2.0, 0.25, 0.25]])}
        >>> updates, _ = tx.update({"w": jnp.zeros((1, 4))}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[2., 1., 0., 0.]], dtype=float32)

    Cost: `group_envelope_prox` in each step.

    References: Refael et al., 2022, arXiv:2212.12921.
    """
    if not strength > 0:
        raise ValueError(
            f"strength is the factor of a proximal step and must be > 0; got {strength}."
        )

    def update(updates: Tree, params: Tree | None) -> Tree:
        if params is None:
            raise ValueError("group_envelope needs the parameters: update(grads, state, params).")
        plan = distribution(params)
        leaves, treedef = jax.tree.flatten(updates)
        for i, (leaf, w) in enumerate(zip(plan.leaves, jax.tree.leaves(params), strict=True)):
            if leaf.sparsity:
                moved = w + leaves[i].astype(w.dtype)
                leaves[i] = group_envelope_prox(leaf.pattern, moved, leaf.density, strength) - w
        return treedef.unflatten(leaves)

    return optax.stateless(update)
