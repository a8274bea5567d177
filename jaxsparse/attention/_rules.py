"""Rules about tokens that the static patterns need beside windows and prefixes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels._token_rules import Rule, Span


@dataclasses.dataclass(frozen=True)
class Stride(Rule):
    """Every `step`-th key, counted from the query in both directions: (q - k) mod step = 0.

    Example:
        >>> from jaxsparse.attention import Stride
        >>> Stride(3)(jnp.array(4), jnp.arange(6)).astype(int)
        Array([0, 1, 0, 0, 1, 0], dtype=int32)
    """

    step: int

    def __post_init__(self) -> None:
        """Raise ValueError on a step below 1."""
        _positive(self, step=self.step)

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return (q - k) % self.step == 0

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`; exact."""
        nearest, farthest = span.q_first - span.k_last, span.q_last - span.k_first
        some = farthest // self.step * self.step >= nearest  # a multiple between the two
        every = (self.step == 1) | (nearest == farthest) & (nearest % self.step == 0)
        return some, every


@dataclasses.dataclass(frozen=True)
class Columns(Rule):
    """Keys whose position in their period of `period` keys is `first` or later.

    Example:
        >>> from jaxsparse.attention import Columns
        >>> Columns(4, first=3)(jnp.array(0), jnp.arange(8)).astype(int)
        Array([0, 0, 0, 1, 0, 0, 0, 1], dtype=int32)
    """

    period: int
    first: int

    def __post_init__(self) -> None:
        """Raise ValueError unless 0 <= first < period."""
        _positive(self, period=self.period)
        if not 0 <= self.first < self.period:
            raise ValueError(f"Columns needs 0 <= first < period; got {self}.")

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        seen = k % self.period >= self.first
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(jnp.shape(q), jnp.shape(k)))

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`; exact."""
        shape = jnp.broadcast_shapes(*(a.shape for a in span))
        phase, length = span.k_first % self.period, span.k_last - span.k_first
        some = (phase >= self.first) | (phase + length >= self.first)
        every = (phase >= self.first) & (phase + length < self.period)
        every |= self.first == 0
        return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)


@dataclasses.dataclass(frozen=True)
class Chunks(Rule):
    """Keys of the query's own chunk of `size` tokens; the first chunk begins at `start`.

    Args:
        size: Tokens of a chunk.
        start: Tokens before it are in no chunk.
        count: How many chunks there are; without end if not given.

    Example:
        >>> from jaxsparse.attention import Chunks
        >>> Chunks(2)(jnp.array(3), jnp.arange(6)).astype(int)
        Array([0, 0, 1, 1, 0, 0], dtype=int32)
    """

    size: int
    start: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError on a size or count below 1."""
        _positive(self, size=self.size, count=1 if self.count is None else self.count)

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        chunk = self._chunk(k)
        seen = (self._chunk(q) == chunk) & (chunk >= 0)
        return seen if self.count is None else seen & (chunk < self.count)

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`; exact."""
        q_first, q_last, k_first, k_last = (self._chunk(a) for a in span)
        last = jnp.minimum(q_last, k_last)
        if self.count is not None:
            last = jnp.minimum(last, self.count - 1)
        some = jnp.maximum(jnp.maximum(q_first, k_first), 0) <= last
        every = (q_first == q_last) & (k_first == k_last) & (q_first == k_first) & (q_first >= 0)
        return some, every if self.count is None else every & (q_first < self.count)

    def _chunk(self, position: jax.Array) -> jax.Array:
        return (position - self.start) // self.size


@dataclasses.dataclass(frozen=True)
class QueriesFrom(Rule):
    """Everything, for the queries at position `start` and later.

    Example:
        >>> from jaxsparse.attention import QueriesFrom
        >>> QueriesFrom(2)(jnp.arange(4), jnp.array(0)).astype(int)
        Array([0, 0, 1, 1], dtype=int32)
    """

    start: int

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return jnp.broadcast_to(q >= self.start, jnp.broadcast_shapes(jnp.shape(q), jnp.shape(k)))

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`; exact."""
        shape = jnp.broadcast_shapes(*(a.shape for a in span))
        some, every = span.q_last >= self.start, span.q_first >= self.start
        return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)


def _positive(rule: Rule, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {rule}.")
