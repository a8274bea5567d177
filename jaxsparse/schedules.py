"""Functions of the step: how far sparsification has come, and when masks change.

A schedule maps a zero-based step to the share (0 to 1) of the final sparsity; any `optax.Schedule`
with that range will do. A `When` maps a step to a bool.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
When = Callable[[jax.Array], jax.Array]


def _ramp(begin: int, end: int, shape: Callable[[jax.Array], jax.Array]) -> Schedule:
    if not 0 <= begin <= end:
        raise ValueError(f"a schedule needs 0 <= begin <= end; got begin={begin}, end={end}.")

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step)
        progress = (step - begin).astype(jnp.float32) / max(end - begin, 1)
        share = shape(jnp.clip(progress, 0.0, 1.0))
        return jnp.where(step >= end, jnp.float32(1), jnp.where(step < begin, 0.0, share))

    return schedule


def cubic(begin: int, end: int) -> Schedule:
    """`1 - (1 - t)^3` from step `begin` to `end`: fast at first, when there is much to remove.

    Example:
        >>> import jaxsparse as jsp
        >>> [round(float(jsp.cubic(10, 20)(t)), 3) for t in (0, 10, 15, 20, 99)]
        [0.0, 0.0, 0.875, 1.0, 1.0]

    References: Zhu & Gupta, To prune, or not to prune, 2017, arXiv:1710.01878.
    """
    return _ramp(begin, end, lambda t: 1 - (1 - t) ** 3)


def linear(begin: int, end: int) -> Schedule:
    """`t` from step `begin` to `end`.

    Example:
        >>> import jaxsparse as jsp
        >>> float(jsp.linear(0, 4)(1))
        0.25
    """
    return _ramp(begin, end, lambda t: t)


def cosine(begin: int, end: int) -> Schedule:
    """`(1 - cos(pi t)) / 2` from step `begin` to `end`: slow at both ends.

    Example:
        >>> import jaxsparse as jsp
        >>> float(jsp.cosine(0, 4)(2))
        0.5
    """
    return _ramp(begin, end, lambda t: (1 - jnp.cos(jnp.pi * t)) / 2)


def constant(share: float = 1.0) -> Schedule:
    """The same share at every step.

    Example:
        >>> import jaxsparse as jsp
        >>> float(jsp.constant()(7))
        1.0
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is the part of the final sparsity, 0 to 1; got {share}.")
    return lambda step: jnp.full(jnp.shape(step), share, jnp.float32)


def halving(n: int, m: int, begin: int, end: int) -> Schedule:
    """Share of n:m sparsity on the way (m - 1):m, m/2:m, m/4:m, ..., n:m; 0 before `begin`.

    The frames have equal length and the last one, n:m, starts at `end`.

    Args:
        n: Weights kept in the end, at least 1 and less than m.
        m: Size of a group.
        begin: Step at which (m - 1):m starts.
        end: Step at which n:m starts.

    Returns:
        A schedule for `ste(distribution, schedule=)`, whose distribution has `NM(n, m)`.

    Example:
        >>> import jaxsparse as jsp
        >>> share = jsp.halving(1, 8, begin=10, end=40)
        >>> [round(8 - 7 * float(share(t))) for t in (9, 10, 20, 30, 40)]
        [8, 7, 4, 2, 1]

    Deviations: checked against the authors' code, which counts log2(m / n) + 1 frames of equal
    length up to the end of the last; here `end` is the start of the last.

    References: Bambhaniya et al., Progressive gradient flow, 2024, arXiv:2402.04744.
    """
    if not (0 < n < m and 0 <= begin <= end):
        raise ValueError(
            f"halving needs 0 < n < m and 0 <= begin <= end; got n={n}, m={m}, begin={begin}, "
            f"end={end}."
        )
    kept = sorted({m - 1, n, *(m >> i for i in range(1, m.bit_length()) if m >> i > n)})[::-1]

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step)
        frame = (step - begin).astype(jnp.float32) / max(end - begin, 1) * (len(kept) - 1)
        i = jnp.clip(jnp.floor(frame + 1e-4).astype(jnp.int32), 0, len(kept) - 1)
        i = jnp.where(step >= end, len(kept) - 1, i)
        shares = jnp.array([(m - k) / (m - n) for k in kept], jnp.float32)
        return jnp.where(step >= begin, shares[i], jnp.float32(0))

    return schedule


def every(k: int, start: int = 0, stop: int | None = None) -> When:
    """True at step t with `start <= t < stop` and `(t - start) % k == 0`.

    Example:
        >>> import jaxsparse as jsp
        >>> [t for t in range(12) if jsp.every(3, start=2, stop=11)(t)]
        [2, 5, 8]
    """
    if k < 1 or start < 0:
        raise ValueError(f"every(k, start) needs k >= 1 and start >= 0; got k={k}, start={start}.")

    def when(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step)
        due = (step >= start) & ((step - start) % k == 0)
        return due if stop is None else due & (step < stop)

    return when


def once(t: int) -> When:
    """True at step t only.

    Example:
        >>> import jaxsparse as jsp
        >>> [t for t in range(5) if jsp.once(3)(t)]
        [3]
    """
    return lambda step: jnp.asarray(step) == t
