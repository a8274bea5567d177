"""How maps of kinds of blocks join: `&`, `|` and heads side by side. Kinds as in `_block_lists`.

A block is in a state: not listed, listed and full, or listed under a rule. What two states join to
depends on their kinds alone, so a join is one look-up in a small table, and then a look at what the
joined rules make of each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels._block_lists import FULL, NONE
from pallas_kernels._token_rules import Rule, both, either, spans

State = tuple[bool, Rule | None]  # of a block: whether it is listed, and the rule inside it
Join = Callable[[State, State], State]


def conjunction(one: State, other: State) -> State:
    """What both allow."""
    return one[0] and other[0], both(one[1], other[1])


def disjunction(one: State, other: State) -> State:
    """What either allows."""
    if not (one[0] and other[0]):
        return other if other[0] else one
    return True, either(one[1], other[1])


def states(rules: Sequence[Rule]) -> list[State]:
    """The states of the kinds -1, 0, 1, ..."""
    return [(False, None), (True, None), *((True, rule) for rule in rules)]


def table_of(
    one: Sequence[Rule], other: Sequence[Rule], join: Join
) -> tuple[tuple[tuple[int, ...], ...], tuple[Rule, ...]]:
    """The kind of every pair of kinds, each + 1, and the rules that the new kinds mean."""
    rules: list[Rule] = []

    def kind(left: State, right: State) -> int:
        listed, rule = join(left, right)
        if listed and rule is not None and rule not in rules:
            rules.append(rule)
        return NONE if not listed else FULL if rule is None else 1 + rules.index(rule)

    table = tuple(tuple(kind(left, right) for right in states(other)) for left in states(one))
    return table, tuple(rules)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def joined(
    one: jax.Array,
    other: jax.Array,
    table: tuple[tuple[int, ...], ...],
    rules: tuple[Rule, ...],
    shape: tuple[int, int],
    block_size: tuple[int, int],
) -> jax.Array:
    """Kinds `[B, A, R, C]` by the table; A of one divides that of the other."""
    heads = max(one.shape[1], other.shape[1])
    one, other = (jnp.repeat(kinds, heads // kinds.shape[1], 1) for kinds in (one, other))
    return settled(jnp.asarray(table, jnp.int32)[one + 1, other + 1], rules, shape, block_size)


@partial(jax.jit, static_argnums=(1, 2, 3))
def settled(
    kinds: jax.Array,
    rules: tuple[Rule, ...],
    shape: tuple[int, int],
    block_size: tuple[int, int],
) -> jax.Array:
    """Kinds with the blocks taken out in which a rule allows nothing; full where it allows all."""
    where = spans(shape, block_size)
    result = kinds
    for kind, rule in enumerate(rules, 1):
        some, every = rule.blocks(where)
        of_rule = jnp.where(some, jnp.where(every, FULL, kind), NONE)
        result = jnp.where(kinds == kind, of_rule, result)
    return result.astype(jnp.int32)


@partial(jax.jit, static_argnums=(1, 2, 3))
def dense_of(
    kinds: jax.Array,
    shape: tuple[int, int],
    block_size: tuple[int, int],
    rules: tuple[Rule, ...],
) -> jax.Array:
    """Bool `[B, A, T, S]` of a map of kinds."""
    (t, s), (bq, bkv) = shape, block_size
    kinds = jnp.repeat(jnp.repeat(kinds, bq, -2), bkv, -1)[..., :t, :s]
    q, k = jnp.arange(t)[:, None], jnp.arange(s)
    dense = kinds == FULL
    for kind, rule in enumerate(rules, 1):
        dense |= (kinds == kind) & rule(q, k)
    return dense
