"""Which blocks of keys each block of queries attends to: index lists built on the device.

A block is full (every query sees every key) or partial, of a kind that names the rule about its
tokens. Lists hold full blocks first, then partial ones, so that kernels look at tokens in the
second loop only. Nothing is of the size T x S.

Shape letters: B batch or 1, A mask heads (1, or any number that divides the heads), R query blocks,
C key blocks, W places of a list.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from pallas_kernels._block_lists import FULL, NONE, BlockLists, kinds_of, sorted_lists
from pallas_kernels._token_rules import Rule, Shifted, Window, both, either, opposite, spans


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["by_query", "by_key"],
    meta_fields=["shape", "block_size", "rules"],
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Blocks of keys that each block of queries attends to, for every batch entry and head.

    `&`, `|` and `~` combine masks of one shape and block size, exactly, token by token. A pytree:
    it passes through jit, vmap and scan, and a new mask of the same sizes never recompiles.

    Attributes:
        by_query: `BlockLists` over R = ceil(T / bq) blocks of queries; the forward pass, and dQ.
        by_key: `BlockLists` over C = ceil(S / bkv) blocks of keys; for dK and dV.
        shape: (T, S), queries and keys; static.
        block_size: (bq, bkv); static.
        rules: What holds for the tokens of partial blocks, by kind; static.

    Example:
        >>> from pallas_kernels import BlockMask, Window
        >>> mask = BlockMask.from_rule(Window(None, 0), (6, 6), (2, 2))
        >>> mask.by_query.count[0, 0].tolist(), mask.by_query.full[0, 0].tolist()
        ([1, 2, 3], [0, 1, 2])
    """

    by_query: BlockLists
    by_key: BlockLists
    shape: tuple[int, int]
    block_size: tuple[int, int]
    rules: tuple[Rule, ...] = ()

    @classmethod
    def from_dense(
        cls,
        block_map: Any,
        block_size: tuple[int, int],
        *,
        shape: tuple[int, int] | None = None,
        rule: Rule | None = None,
        capacity: int | None = None,
    ) -> BlockMask:
        """The mask of a map of blocks.

        Args:
            block_map: bool `[B or 1, A, R, C]`, or `[R, C]` for all; A = 1, or divides the heads.
            block_size: (bq, bkv), tokens.
            shape: (T, S) if the last blocks are not whole; (R bq, C bkv) if not given.
            rule: Holds inside the mapped blocks; blocks without an allowed pair are left out.
            capacity: W, the most blocks that a block of queries may list; C if not given. Beyond it
                the last ones of the list (partial ones, and those of late keys) are left out, which
                is an error on the host and under checkify.

        Raises:
            ValueError: If sizes do not fit.

        Example:
            >>> from pallas_kernels import BlockMask
            >>> BlockMask.from_dense(jnp.eye(2, dtype=bool), (64, 64)).shape
            (128, 128)
        """
        block_map = jnp.asarray(block_map)
        if block_map.dtype != bool or block_map.ndim not in (2, 4):
            raise ValueError(
                "block_map must be bool [B or 1, heads, query blocks, key blocks] or [query "
                f"blocks, key blocks]; got {block_map.dtype} {block_map.shape}."
            )
        block_map = block_map.reshape((1,) * (4 - block_map.ndim) + block_map.shape)
        rows, cols = block_map.shape[-2:]
        (bq, bkv) = block_size
        shape = shape or (rows * bq, cols * bkv)
        if (rows, cols) != _grid(shape, block_size):
            raise ValueError(
                f"{shape} tokens in blocks of {block_size} are {_grid(shape, block_size)} blocks; "
                f"block_map is {block_map.shape}."
            )
        kinds = jnp.where(block_map, FULL, NONE)
        if rule is not None:
            some, every = rule.blocks(spans(shape, block_size))
            kinds = jnp.where(some & block_map, jnp.where(every, FULL, 1), NONE)
        rules = () if rule is None else (rule,)
        return cls._from_kinds(kinds, shape, block_size, rules, capacity)

    @classmethod
    def from_rule(
        cls,
        rule: Rule,
        shape: tuple[int, int],
        block_size: tuple[int, int],
        *,
        q_offset: int = 0,
    ) -> BlockMask:
        """The mask of a rule about tokens, such as `Window(1024, 0)`, for all heads.

        Args:
            rule: Which keys a query sees.
            shape: (T, S), tokens.
            block_size: (bq, bkv), tokens.
            q_offset: Position of the first query; keys begin at 0.

        Example:
            >>> from pallas_kernels import BlockMask, Window
            >>> BlockMask.from_rule(Window(1, 0), (4, 4), (2, 2)).todense()[0, 0].astype(int)
            Array([[1, 0, 0, 0],
                   [1, 1, 0, 0],
                   [0, 1, 1, 0],
                   [0, 0, 1, 1]], dtype=int32)
        """
        everything = jnp.ones(_grid(shape, block_size), bool)
        rule = Shifted(rule, q_offset) if q_offset else rule
        return cls.from_dense(everything, block_size, shape=shape, rule=rule)

    @classmethod
    def from_lists(
        cls,
        index: Any,
        valid: Any,
        shape: tuple[int, int],
        block_size: tuple[int, int],
        *,
        rule: Rule | None = None,
    ) -> BlockMask:
        """The mask of listed key blocks, as a top-k gives them. A block listed twice counts once.

        Args:
            index: Integers `[B or 1, A, R, W]`, 0 to C - 1 where valid.
            valid: bool, broadcastable to `index`.
            shape: (T, S), tokens.
            block_size: (bq, bkv), tokens.
            rule: As for `from_dense`.

        Raises:
            ValueError: If sizes do not fit, or on the host an index is out of range or occurs twice
                in a list; under checkify that is a check.

        Example:
            >>> from pallas_kernels import BlockMask
            >>> lists = jnp.array([[[[0, 0], [1, 0]]]])
            >>> valid = jnp.array([[True, False], [True, True]])
            >>> BlockMask.from_lists(lists, valid, (4, 4), (2, 2)).block_map[0, 0].astype(int)
            Array([[1, 0],
                   [1, 1]], dtype=int32)
        """
        rows, cols = _grid(shape, block_size)
        index = jnp.asarray(index)
        valid = jnp.broadcast_to(jnp.asarray(valid), index.shape)
        if index.ndim != 4 or index.shape[2] != rows:
            raise ValueError(
                f"index must be [B or 1, heads, {rows} query blocks, places] for {shape} tokens in "
                f"blocks of {block_size}; got {index.shape}."
            )
        chosen = (index[..., None] == jnp.arange(cols)) & valid[..., None]  # [B, A, R, W, C]
        times = chosen.sum(-2)
        _require(
            jnp.all(times.sum(-1) == valid.sum(-1)),
            f"an index of a key block is out of range: it must be 0 to {cols - 1} where valid.",
        )
        _require(jnp.all(times <= 1), "a key block is listed twice by one block of queries.")
        width = min(cols, index.shape[-1])
        return cls.from_dense(times > 0, block_size, shape=shape, rule=rule, capacity=width)

    @classmethod
    def _from_kinds(
        cls,
        kinds: jax.Array,
        shape: tuple[int, int],
        block_size: tuple[int, int],
        rules: tuple[Rule, ...],
        capacity: int | None = None,
    ) -> BlockMask:
        """The mask of a map `[B, A, R, C]` of kinds; rules that nothing uses may stay."""
        rows, cols = kinds.shape[-2:]

        def lists(kinds: jax.Array) -> BlockLists:
            blocks = kinds.shape[-1]
            index = jnp.arange(blocks, dtype=jnp.int32)
            return sorted_lists(index, kinds, kinds > 0, blocks, len(rules) + 1)

        by_query = lists(kinds)
        if capacity is not None and capacity < cols:
            if capacity < 1:
                raise ValueError(f"capacity must be at least 1; got {capacity}.")
            most = by_query.count.max()
            _require(
                most <= capacity,
                f"a block of queries lists more than capacity={capacity} blocks of keys.",
            )
            index, kind, full, count = by_query
            by_query = BlockLists(
                index[..., :capacity],
                kind[..., :capacity],
                jnp.minimum(full, capacity),
                jnp.minimum(count, capacity),
            )
            kinds = kinds_of(by_query, cols)
        return cls(by_query, lists(kinds.swapaxes(-1, -2)), shape, block_size, rules)

    @property
    def kinds(self) -> jax.Array:
        """int32 `[B, A, R, C]`: -1 for no block, 0 for a full one, c for one under rules[c - 1]."""
        return kinds_of(self.by_query, self.grid[1])

    @property
    def block_map(self) -> jax.Array:
        """Bool `[B, A, R, C]`: the blocks that are listed, full or partial."""
        return self.kinds >= 0

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C), blocks of queries and of keys."""
        return _grid(self.shape, self.block_size)

    @property
    def heads(self) -> int:
        """A, how many heads have lists of their own; 1 for all alike."""
        return self.by_query.index.shape[1]

    def todense(self) -> jax.Array:
        """Bool `[B, A, T, S]`, token by token. For tests and pictures: T x S entries."""
        (t, s), (bq, bkv) = self.shape, self.block_size
        kinds = jnp.repeat(jnp.repeat(self.kinds, bq, -2), bkv, -1)[..., :t, :s]
        q, k = jnp.arange(t)[:, None], jnp.arange(s)
        dense = kinds == FULL
        for kind, rule in enumerate(self.rules, 1):
            dense |= (kinds == kind) & rule(q, k)
        return dense

    def density(self, *, causal: bool = False) -> jax.Array:
        """float32 scalar: listed blocks over all blocks, the mean over batch and heads.

        Args:
            causal: Count, above and below the line, only blocks with a key not after a query.
        """
        if not causal:
            return self.block_map.mean(dtype=jnp.float32)
        triangle = Window(None, 0).blocks(spans(self.shape, self.block_size))[0]
        return (self.block_map & triangle).mean((0, 1), dtype=jnp.float32).sum() / triangle.sum()

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that both masks allow."""
        return self._combined(other, _and)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either mask allows."""
        return self._combined(other, _or)

    def __invert__(self) -> BlockMask:
        """Pairs that the mask does not allow."""
        kinds = self.kinds
        flipped = jnp.where(kinds == NONE, FULL, jnp.where(kinds == FULL, NONE, kinds))
        rules = tuple(map(opposite, self.rules))
        return self._from_kinds(flipped, self.shape, self.block_size, rules)

    def _combined(self, other: BlockMask, join: Any) -> BlockMask:
        """The mask whose block (r, c) is `join` of those of the two; each is (listed, rule)."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        if (self.shape, self.block_size) != (other.shape, other.block_size):
            raise ValueError(
                "masks combine if they have one shape and one block_size; got "
                f"{self.shape} in {self.block_size} and {other.shape} in {other.block_size}."
            )
        rules: list[Rule] = []
        table = np.full((len(self.rules) + 2, len(other.rules) + 2), NONE)  # by kind + 1
        for a, one in enumerate(self._states()):
            for b, two in enumerate(other._states()):
                listed, rule = join(one, two)
                if listed and rule is not None and rule not in rules:
                    rules.append(rule)
                if listed:
                    table[a, b] = FULL if rule is None else 1 + rules.index(rule)
        heads = max(self.heads, other.heads)
        if heads % self.heads or heads % other.heads:
            raise ValueError(
                "masks combine if the heads of one divide those of the other; got "
                f"{self.heads} and {other.heads}."
            )
        one, two = (jnp.repeat(mask.kinds, heads // mask.heads, 1) for mask in (self, other))
        kinds = jnp.asarray(table, jnp.int32)[one + 1, two + 1]
        some = kinds >= 0
        for kind, rule in enumerate(rules, 1):  # what a joined rule makes full or empty
            any_, every = rule.blocks(spans(self.shape, self.block_size))
            here = kinds == kind
            some &= ~here | any_
            kinds = jnp.where(here & every, FULL, kinds)
        kinds = jnp.where(some, kinds, NONE)
        return self._from_kinds(kinds, self.shape, self.block_size, tuple(rules))

    def _states(self) -> list[_State]:
        """(listed, rule) of the kinds -1, 0, 1, ..."""
        return [(False, None), (True, None), *((True, rule) for rule in self.rules)]


_State = tuple[bool, Rule | None]  # of a block: whether it is listed, and the rule inside it


def _and(one: _State, other: _State) -> _State:
    return one[0] and other[0], both(one[1], other[1])


def _or(one: _State, other: _State) -> _State:
    if not (one[0] and other[0]):
        return other if other[0] else one
    return True, either(one[1], other[1])


def _grid(shape: tuple[int, int], block_size: tuple[int, int]) -> tuple[int, int]:
    (t, s), (bq, bkv) = shape, block_size
    if min(t, s, bq, bkv) < 1:
        raise ValueError(f"shape and block_size must be positive; got {shape} and {block_size}.")
    return -(-t // bq), -(-s // bkv)


def _require(holds: jax.Array, rule: str) -> None:
    """Raise ValueError where `holds` is False; for a traced value, a check for checkify."""
    if isinstance(holds, Tracer):
        checkify.debug_check(holds, "BlockMask: " + rule)
    elif not bool(holds):
        raise ValueError("BlockMask: " + rule)
