"""Rules about single tokens: which keys a query may see, by position. Static, hashable, composable.

A rule answers twice: for positions (`rule(q, k)`, evaluated inside the kernels on partial blocks
only) and for whole blocks (`rule.blocks(...)`, from their first and last positions), which tells
the blocks that are full, partial or empty without looking at their tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Span(NamedTuple):
    """First and last positions of query and key blocks; int32, they broadcast together."""

    q_first: jax.Array
    q_last: jax.Array
    k_first: jax.Array
    k_last: jax.Array


class Rule(Protocol):
    """Which keys a query sees; `&`, `|`, `~` combine. Equal rules hash alike: they are static."""

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Whether the query at position q sees the key at position k; int32 in, bool out."""
        ...

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """(some, every): whether the block may have an allowed pair, and surely only such pairs."""
        ...

    def __and__(self, other: Rule) -> Rule:
        """Both."""
        return And(self, other)

    def __or__(self, other: Rule) -> Rule:
        """Either."""
        return Or(self, other)

    def __invert__(self) -> Rule:
        """The opposite."""
        return Not(self)


@dataclasses.dataclass(frozen=True)
class Window(Rule):
    """q - left <= k <= q + right; None does not limit. `Window(None, 0)` is causal.

    Example:
        >>> from pallas_kernels import Window
        >>> Window(2, 0)(jnp.arange(4)[:, None], jnp.arange(4)).astype(int)
        Array([[1, 0, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 0],
               [0, 1, 1, 1]], dtype=int32)
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError on an empty window."""
        if self.left is not None and self.right is not None and self.left + self.right < 0:
            raise ValueError(f"Window needs left + right >= 0, else nobody sees a key; got {self}.")

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        allowed = jnp.ones(jnp.broadcast_shapes(jnp.shape(q), jnp.shape(k)), bool)
        if self.left is not None:
            allowed &= k >= q - self.left
        if self.right is not None:
            allowed &= k <= q + self.right
        return allowed

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`; exact."""
        some = every = jnp.ones(jnp.broadcast_shapes(*(a.shape for a in span)), bool)
        if self.left is not None:
            some &= span.k_last >= span.q_first - self.left
            every &= span.k_first >= span.q_last - self.left
        if self.right is not None:
            some &= span.k_first <= span.q_last + self.right
            every &= span.k_last <= span.q_first + self.right
        return some, every


@dataclasses.dataclass(frozen=True)
class Prefix(Rule):
    """The first `length` keys, for every query. `Window(None, 0) | Prefix(n)` is a prefix LM.

    Example:
        >>> from pallas_kernels import Prefix
        >>> Prefix(2)(jnp.array(0), jnp.arange(4)).astype(int)
        Array([1, 1, 0, 0], dtype=int32)
    """

    length: int

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return jnp.broadcast_to(k < self.length, jnp.broadcast_shapes(jnp.shape(q), jnp.shape(k)))

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`; exact."""
        shape = jnp.broadcast_shapes(*(a.shape for a in span))
        some, every = span.k_first < self.length, span.k_last < self.length
        return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)


@dataclasses.dataclass(frozen=True)
class Where(Rule):
    """Any function of positions, `function(q, k) -> bool`. Every block it meets counts as partial.

    Give the same function each time, not a new lambda, or jit compiles again. On TPU and GPU it is
    traced into the kernel: elementwise arithmetic on int32 arrays of one shape, and no constant
    arrays.

    Example:
        >>> from pallas_kernels import Where
        >>> Where(lambda q, k: (q - k) % 2 == 0)(jnp.array(2), jnp.arange(4)).astype(int)
        Array([1, 0, 1, 0], dtype=int32)
    """

    function: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return self.function(q, k)

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`."""
        shape = jnp.broadcast_shapes(*(a.shape for a in span))
        return jnp.ones(shape, bool), jnp.zeros(shape, bool)


@dataclasses.dataclass(frozen=True)
class And(Rule):
    """Both rules."""

    one: Rule
    other: Rule

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return self.one(q, k) & self.other(q, k)

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`."""
        (some, every), (some_too, every_too) = self.one.blocks(span), self.other.blocks(span)
        return some & some_too, every & every_too


@dataclasses.dataclass(frozen=True)
class Or(Rule):
    """Either rule."""

    one: Rule
    other: Rule

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return self.one(q, k) | self.other(q, k)

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`."""
        (some, every), (some_too, every_too) = self.one.blocks(span), self.other.blocks(span)
        return some | some_too, every | every_too


@dataclasses.dataclass(frozen=True)
class Not(Rule):
    """The opposite."""

    rule: Rule

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return self.rule(q, k) ^ True  # not ~, which Mosaic GPU lacks

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`."""
        some, every = self.rule.blocks(span)
        return ~every, ~some


@dataclasses.dataclass(frozen=True)
class Shifted(Rule):
    """The rule for a query that stands `offset` positions later."""

    rule: Rule
    offset: int

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """See `Rule`."""
        return self.rule(q + self.offset, k)

    def blocks(self, span: Span) -> tuple[jax.Array, jax.Array]:
        """See `Rule`."""
        q_first, q_last = span.q_first + self.offset, span.q_last + self.offset
        return self.rule.blocks(span._replace(q_first=q_first, q_last=q_last))


def both(one: Rule | None, other: Rule | None) -> Rule | None:
    """The conjunction; None is the rule that allows everything."""
    if one is None or other is None or one == other:
        return one if other is None else other
    if isinstance(one, Window) and isinstance(other, Window):
        left, right = (
            min((side for side in sides if side is not None), default=None)
            for sides in ((one.left, other.left), (one.right, other.right))
        )
        if left is None or right is None or left + right >= 0:
            return Window(left, right)
    return And(one, other)


def either(one: Rule | None, other: Rule | None) -> Rule | None:
    """The disjunction; None is the rule that allows everything."""
    if one is None or other is None:
        return None
    return one if one == other else Or(one, other)


def opposite(rule: Rule) -> Rule:
    """The negation."""
    return rule.rule if isinstance(rule, Not) else Not(rule)


def spans(shape: tuple[int, int], block_size: tuple[int, int]) -> Span:
    """Positions of all blocks of queries [Nq, 1] and keys [1, Nk]; tokens past the end left out."""

    def ends(length: int, block: int) -> tuple[Any, Any]:
        first = jnp.arange(0, length, block, dtype=jnp.int32)
        return first, jnp.minimum(first + block, length) - 1

    (q_first, q_last), (k_first, k_last) = (ends(*lb) for lb in zip(shape, block_size, strict=True))
    return Span(q_first[:, None], q_last[:, None], k_first[None], k_last[None])
