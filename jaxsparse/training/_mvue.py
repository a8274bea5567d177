"""MVUE: Chmiel et al., Minimum variance unbiased N:M sparsity for the neural gradients, 2022."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse.patterns import NM, TransposableNM


def mvue(pattern: NM, x: jax.Array, *, key: jax.Array) -> jax.Array:
    """An n:m sample of x that is x on average, with the least variance there is.

    Entry i of a group is kept with probability p_i = min(1, |x_i| / L) and becomes x_i / p_i, where
    L is such that the p_i add up to n. So entries above L stay as they are, and the others become
    L or 0, with the sign of x. Given these probabilities one uniform number u decides a group: i is
    kept if an integer lies in (P_(i-1) + u, P_i + u], P the running sum of the p below 1. Exactly
    n are kept, or all that are not zero where these are fewer.

    Args:
        pattern: `NM(n, m, axis)`.
        x: `[..., K, N]`, floating point.
        key: Random key.

    Returns:
        The shape, dtype and sharding of `x`. A group with an entry that is not finite stays as it
        is, so that the gate of `sparsify` sees it.

    Raises:
        ValueError: If the shape does not fit, or for `TransposableNM`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> x = jnp.array([[6.0, -1.0, 0.5, 0.5]])
        >>> jsp.mvue(jsp.NM(2, 4, axis=-1), x, key=jax.random.key(0))  # -1 with probability 1/2
        Array([[ 6., -2.,  0.,  0.]], dtype=float32)

    Cost: n + 4 passes over x and a random number for each group.

    Deviations: the sum of the variances of the entries depends only on the p_i, and these minimise
    it (Lagrange), so this is the minimum for every n:m. The paper has closed forms for 1:2 and 2:4;
    for 2:4 the authors of S-STE use an approximation, two draws without replacement, whose variance
    is larger. u moves in steps of 2**-20, so the mean is exact up to L * 2**-20.

    References: Chmiel et al., 2022, arXiv:2203.10991.
    """
    if isinstance(pattern, TransposableNM):
        raise ValueError(f"mvue samples along one axis: use NM({pattern.n}, {pattern.m}).")
    x = jnp.asarray(x)
    noise = jax.eval_shape(lambda x: pattern.gather(x).max(pattern.axes, keepdims=True), x)
    u = jax.random.uniform(key, noise.shape, jnp.float32)
    return _tree.in_auto_mode(lambda x, u: _sample(pattern, x, u), x, u)


def _sample(pattern: NM, x: jax.Array, u: jax.Array) -> jax.Array:
    """The sample that a number in [0, 1) for each group decides."""
    n, axis = pattern.n, pattern.axes[0]
    gathered = pattern.gather(x)
    size = jnp.abs(gathered).astype(jnp.float32)
    level, whole = _level(size, n, axis)
    small = jnp.where(whole | (level == 0), 0, size / jnp.where(level == 0, 1, level))
    room = n - jnp.sum(whole, axis, keepdims=True, dtype=jnp.float32)
    upto = jnp.minimum(jnp.cumsum(small, gathered.ndim + axis), room)
    # In steps of 2**-20, so that adding to it cannot round up to the next integer.
    u = jnp.floor(u * 2**20) * 2.0**-20
    floors = jnp.floor(upto + u).astype(jnp.int32)
    before = jnp.roll(floors, 1, axis)
    first = jnp.arange(pattern.m).reshape(-1, *[1] * (-axis - 1)) == 0
    drawn = (floors > jnp.where(first, 0, before)) & (small > 0)
    value = jnp.where(drawn, jnp.sign(gathered) * level.astype(x.dtype), jnp.zeros((), x.dtype))
    sample = jnp.where(whole | ~jnp.isfinite(level), gathered, value)
    return sample.reshape(x.shape)


def _level(size: jax.Array, n: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """L, and which entries are at or above it: their number and the rest over L make n."""
    whole = jnp.zeros(size.shape, bool)
    level = jnp.zeros_like(jnp.sum(size, axis, keepdims=True))
    for _ in range(n):  # each turn finds at least one more, or is the last that changes anything
        room = n - jnp.sum(whole, axis, keepdims=True, dtype=jnp.float32)
        rest = jnp.sum(jnp.where(whole, 0, size), axis, keepdims=True)
        level = jnp.where(room > 0, rest / jnp.maximum(room, 1), level)
        whole = (size >= level) & (size > 0)
    return level, whole
