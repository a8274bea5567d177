"""Which blocks of keys each block of queries attends to: index lists built on the device.

A block is full (every query sees every key) or partial, of a kind that names the rule about its
tokens. Lists hold full blocks first, then partial ones, so that kernels look at tokens in the
second loop only. Nothing is of the size T x S.

Shape letters: B batch or 1, A mask heads (1, or any number that divides the heads), R query blocks,
C key blocks, W places of a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

from pallas_kernels._block_lists import FULL, NONE, BlockLists, kinds_of, lists_of, times_listed
from pallas_kernels._join_masks import (
    Join,
    conjunction,
    dense_of,
    disjunction,
    joined,
    settled,
    table_of,
)
from pallas_kernels._token_rules import Rule, Shifted, Window, opposite, spans


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
        rules = () if rule is None else (rule,)
        kinds = settled(jnp.where(block_map, len(rules), NONE), rules, shape, block_size)
        return cls._sorted(kinds, shape, block_size, rules, capacity)

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
        times = times_listed(index, valid, cols)
        _require(
            jnp.all(times.sum(-1) == valid.sum(-1)),
            f"an index of a key block is out of range: it must be 0 to {cols - 1} where valid.",
        )
        _require(jnp.all(times <= 1), "a key block is listed twice by one block of queries.")
        width = min(cols, index.shape[-1])
        return cls.from_dense(times > 0, block_size, shape=shape, rule=rule, capacity=width)

    @classmethod
    def from_kinds(
        cls,
        kinds: Any,
        shape: tuple[int, int],
        block_size: tuple[int, int],
        *,
        rules: tuple[Rule, ...] = (),
        capacity: int | None = None,
    ) -> BlockMask:
        """The mask of a map of kinds: each block may have a rule of its own.

        Args:
            kinds: int32 `[B or 1, A, R, C]`: -1 for no block, 0 for a full one, c for one under
                `rules[c - 1]`, which is left out if the rule allows nothing in it.
            shape: (T, S), tokens.
            block_size: (bq, bkv), tokens.
            rules: Static.
            capacity: As for `from_dense`.

        Raises:
            ValueError: If sizes do not fit, or on the host a kind has no rule; under checkify that
                is a check.

        Example:
            >>> from pallas_kernels import BlockMask, Window
            >>> heads = jnp.array([[[[1, 0], [0, 1]], [[2, -1], [2, 2]]]])  # two heads
            >>> rules = (Window(None, 0), Window(1, 0))
            >>> mask = BlockMask.from_kinds(heads, (4, 4), (2, 2), rules=rules)
            >>> mask.todense()[0, :, 3].astype(int)
            Array([[1, 1, 1, 1],
                   [0, 0, 1, 1]], dtype=int32)
        """
        kinds = jnp.asarray(kinds)
        if kinds.ndim != 4 or kinds.shape[2:] != _grid(shape, block_size):
            raise ValueError(
                f"kinds must be [B or 1, heads, *{_grid(shape, block_size)}] for {shape} tokens in "
                f"blocks of {block_size}; got {kinds.shape}."
            )
        _require(
            jnp.all((kinds >= NONE) & (kinds <= len(rules))),
            f"a kind is out of range: it must be -1 to {len(rules)}, the number of rules.",
        )
        return cls._sorted(
            settled(kinds, rules, shape, block_size), shape, block_size, rules, capacity
        )

    @classmethod
    def from_heads(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """The mask of which the heads are those of the given masks, side by side.

        Args:
            masks: Of one shape and block size; each of 1 or B batch entries.

        Raises:
            ValueError: If sizes do not fit.

        Example:
            >>> from pallas_kernels import BlockMask, Window
            >>> masks = [BlockMask.from_rule(Window(n, 0), (8, 8), (2, 2)) for n in (1, 3)]
            >>> BlockMask.from_heads(masks).by_query.count[0]
            Array([[1, 2, 2, 2],
                   [1, 2, 3, 3]], dtype=int32)
        """
        if not masks:
            raise ValueError("from_heads needs at least one mask; got none.")
        first, rules, parts = masks[0], [], []
        batch = max(mask.by_query.index.shape[0] for mask in masks)
        for mask in masks:
            first._check_alike(mask)
            rules += [rule for rule in mask.rules if rule not in rules]
            names = jnp.asarray([NONE, FULL, *(1 + rules.index(r) for r in mask.rules)], jnp.int32)
            kinds = names[mask.kinds + 1]
            parts.append(jnp.broadcast_to(kinds, (batch, *kinds.shape[1:])))
        together = jnp.concatenate(parts, 1)
        return cls._sorted(together, first.shape, first.block_size, tuple(rules))

    @classmethod
    def _sorted(
        cls,
        kinds: jax.Array,
        shape: tuple[int, int],
        block_size: tuple[int, int],
        rules: tuple[Rule, ...],
        capacity: int | None = None,
    ) -> BlockMask:
        """The mask of a map of kinds that already say which blocks are full or empty."""
        cols = kinds.shape[-1]
        by_query = lists_of(kinds, len(rules) + 1)
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
        by_key = lists_of(kinds.swapaxes(-1, -2), len(rules) + 1)
        return cls(by_query, by_key, shape, block_size, rules)

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
        return dense_of(self.kinds, self.shape, self.block_size, self.rules)

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
        return self._combined(other, conjunction)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either mask allows."""
        return self._combined(other, disjunction)

    def __invert__(self) -> BlockMask:
        """Pairs that the mask does not allow."""
        kinds = self.kinds
        flipped = jnp.where(kinds == NONE, FULL, jnp.where(kinds == FULL, NONE, kinds))
        rules = tuple(map(opposite, self.rules))
        return self._sorted(flipped, self.shape, self.block_size, rules)

    def _check_alike(self, other: BlockMask) -> None:
        """Raise ValueError unless the two masks are of one shape and block size."""
        if (self.shape, self.block_size) != (other.shape, other.block_size):
            raise ValueError(
                "masks combine if they have one shape and one block_size; got "
                f"{self.shape} in {self.block_size} and {other.shape} in {other.block_size}."
            )

    def _combined(self, other: BlockMask, join: Join) -> BlockMask:
        """The mask whose block (r, c) is `join` of those of the two."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_alike(other)
        heads = self.heads, other.heads
        if max(heads) % min(heads):
            raise ValueError(
                f"masks combine if the heads of one divide those of the other; got {heads}."
            )
        batch = self.by_query.index.shape[0], other.by_query.index.shape[0]
        if min(batch) not in (1, max(batch)):
            raise ValueError(f"masks combine if they have as many batch entries or 1; got {batch}.")
        table, rules = table_of(self.rules, other.rules, join)
        kinds = joined(self.kinds, other.kinds, table, rules, self.shape, self.block_size)
        return self._sorted(kinds, self.shape, self.block_size, rules)


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
