"""Exact selection of the largest scores of each group, without a sort.

The only place where scores become masks. The result is the one a stable argsort would give: of
each group the `count` largest scores, the first ones among equal scores; `-0.0` ties with `0.0`,
NaN ranks below `-inf` and is never chosen (fewer than `count` if too few are left).

Scores are compared as integers in the order of the floats: `key(x) = bits(x)` for x >= 0 and
`-(bits(x) & 0x7FFFFFFF)` below; comparing floats would take subnormal numbers for zero on a CPU.

* Groups of at most 32 scores along one axis (N:M): the rank of each score, by comparing pairs.
* Otherwise the threshold is found bit by bit, 16 bits at a time on int16 digits of the key, which
  is half the memory traffic: 32 passes of compare and sum (16 for bf16), then ties by index.

Nothing is flattened, gathered or sorted, so a sharded array stays where it is and only counts are
reduced across devices. Cost: 2 bytes a score of temporary memory, 2 to 32 passes over them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

PAIRWISE = 32  # largest group that is ranked by comparing pairs


def sort_key(scores: jax.Array) -> jax.Array:
    """Integer keys in the order of the scores: int32, or int64 for 64-bit scores.

    NaN gets the lowest integer, which no other float has.
    """
    dtype = scores.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"scores must be real to be ranked; got {dtype}. Score by jnp.abs instead.")
    wide = dtype.itemsize == 8
    key_type = jnp.int64 if wide else jnp.int32
    lowest = jnp.iinfo(key_type).min
    if not jnp.issubdtype(dtype, jnp.floating):
        if dtype in (jnp.uint32, jnp.uint64):
            scores = lax.bitcast_convert_type(scores, key_type) ^ jnp.asarray(lowest, key_type)
        return scores.astype(key_type)
    bits = lax.bitcast_convert_type(scores.astype(jnp.float64 if wide else jnp.float32), key_type)
    magnitude = bits & jnp.iinfo(key_type).max
    infinity = 0x7FF0000000000000 if wide else 0x7F800000
    key = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, lowest, key)


def count_true(condition: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """How many are True in each group, int32, with 1 along `axes`.

    XLA on a CPU rewrites a long reduction so that its input is first written out as int32; summing
    up to 16 neighbours on their own avoids that. They are chosen such that the axis stays divisible
    by the power of two, up to 64, that divides it: sharded over so many devices, nothing moves.
    """
    first = condition.ndim + axes[0]
    size = condition.shape[first]
    spare = size // math.gcd(size, 64)
    step = max(c for c in range(1, 17) if spare % c == 0) if spare else 1
    if step > 1:
        shape = (*condition.shape[:first], size // step, step, *condition.shape[first + 1 :])
        condition = lax.optimization_barrier(
            jnp.sum(condition.reshape(shape), first + 1, dtype=jnp.int32)
        )
    return jnp.sum(condition, axes, keepdims=True, dtype=jnp.int32)


def _threshold(
    key: jax.Array, count: jax.Array, axes: tuple[int, ...], bits: int
) -> tuple[jax.Array, jax.Array]:
    """The `count`-th largest key of each group, and how many keys are at or above it.

    Bit by bit from the highest, on int16 digits of the key. Keys are multiples of 2**(width -
    bits). Invariant: at least `count` keys of the group are at or above the threshold.
    """
    width = 8 * key.dtype.itemsize
    low, high = -(2**15), 2**15 - 1
    threshold = jnp.zeros_like(count, key.dtype)
    at_least = jnp.full_like(count, math.prod(key.shape[a] for a in axes))
    for shift in range(width - 16, width - 16 - bits, -16):
        digit = (key >> shift).astype(jnp.int16)  # wraps: the low 16 bits
        if shift < width - 16:  # lower digits are unsigned, and count only below an equal prefix
            prefix, chosen = key >> (shift + 16), threshold >> (shift + 16)
            digit = digit ^ jnp.int16(low)
            digit = jnp.where(prefix > chosen, high, jnp.where(prefix < chosen, low, digit))
        digit = lax.optimization_barrier(digit.astype(jnp.int16))

        def decide(i, state, digit=digit):
            chosen, at_least = state
            bit = jnp.int16(1) << (15 - i).astype(jnp.int16)
            candidate = chosen ^ bit  # from the lowest: the sign bit counts the other way round
            counted = count_true(digit >= candidate, axes)
            enough = counted >= count
            return jnp.where(enough, candidate, chosen), jnp.where(enough, counted, at_least)

        start = jnp.full_like(count, low, jnp.int16)
        chosen, at_least = lax.fori_loop(0, 16, decide, (start, at_least))
        chosen = chosen.astype(key.dtype)
        if shift < width - 16:
            chosen = chosen - low
        threshold = threshold | (chosen << shift)
    return threshold, at_least


def _last_tie(
    equal: jax.Array, need: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Where the `need`-th True of each group stands: index on axes[0], flat index on the others."""
    first, rest = axes[0], axes[1:]
    along = lax.broadcasted_iota(jnp.int32, equal.shape, equal.ndim + first)
    if not rest:  # by bisection on the index
        bits = equal.shape[first].bit_length()

        def decide(i, last):
            candidate = last + (jnp.int32(1) << (bits - 1 - i))
            return jnp.where(count_true(equal & (along < candidate), axes) < need, candidate, last)

        return lax.fori_loop(0, bits, decide, jnp.zeros_like(need)), need
    in_rows = _sum(equal, rest)
    rows = lax.broadcasted_iota(jnp.int32, in_rows.shape, in_rows.ndim + first)
    row = _sum(jnp.cumsum(in_rows, in_rows.ndim + first) < need, (first,))
    need = need - _sum(jnp.where(rows < row, in_rows, 0), (first,))
    in_row = jnp.moveaxis(_sum(equal & (along == row), (first,)), rest, range(-len(rest), 0))
    flat = in_row.reshape(*in_row.shape[: equal.ndim - len(rest)], -1)
    before = jnp.cumsum(flat, flat.ndim - 1) < need.reshape(*flat.shape[:-1], 1)
    return row, _sum(before, (-1,)).reshape(row.shape)


def _sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x, axes, keepdims=True, dtype=jnp.int32)


def _search(
    key: jax.Array, valid: jax.Array, count: jax.Array, axes: tuple[int, ...], bits: int
) -> jax.Array:
    """Keys above the threshold, and the first ones equal to it until there are `count`."""
    threshold, at_least = _threshold(key, count, axes, bits)
    spare = at_least - count

    def all_ties():
        everywhere = jnp.full_like(count, jnp.iinfo(jnp.int32).max)
        return everywhere, everywhere

    def some_ties():
        equal = (key == threshold) & valid
        return _last_tie(equal, _sum(equal, axes) - spare, axes)

    last, position = lax.cond(jnp.all(spare <= 0), all_ties, some_ties)
    along = lax.broadcasted_iota(jnp.int32, key.shape, key.ndim + axes[0])
    early = along <= last
    if len(axes) > 1:
        flat = jnp.zeros((), jnp.int32)
        for axis in axes[1:]:
            step = math.prod(key.shape[a] for a in axes if a > axis)
            flat = flat + step * lax.broadcasted_iota(jnp.int32, key.shape, key.ndim + axis)
        early = (along < last) | (along == last) & (flat <= position)
    return valid & (count > 0) & ((key > threshold) | (key == threshold) & early)


def _pairwise(key: jax.Array, valid: jax.Array, count: jax.Array, axis: int) -> jax.Array:
    """By rank: how many of the group beat each key."""
    index = lax.broadcasted_iota(jnp.int32, key.shape, key.ndim + axis)
    rank = jnp.zeros(key.shape, jnp.int32)
    for j in range(key.shape[axis]):
        rival = lax.index_in_dim(key, j, key.ndim + axis)
        rank += ((rival > key) | (rival == key) & (j < index)).astype(jnp.int32)
    return (rank < count) & valid


def keep_top(scores: jax.Array, count: jax.Array | int, axes: tuple[int, ...]) -> jax.Array:
    """The `count` largest scores of each group, as a mask.

    Args:
        scores: Any shape and any real dtype.
        count: How many to keep: an int, or int32 broadcastable to the shape of `scores` with 1
            along `axes`. May be traced.
        axes: Axes within which scores compete, negative and ascending; the others index groups.

    Returns:
        A bool mask of the shape of `scores`.
    """
    size = math.prod(scores.shape[a] for a in axes)
    if size >= 2**31:
        raise ValueError(
            f"a group of {size} scores exceeds 2**31 - 1, the largest count of int32. Split the "
            f"leaf of shape {scores.shape} along a leading stacked axis."
        )
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    groups = [1 if i - scores.ndim in axes else n for i, n in enumerate(scores.shape)]
    count = jnp.broadcast_to(jnp.clip(jnp.asarray(count, jnp.int32), 0, size), groups)
    key, valid = sort_key(scores), scores == scores
    if len(axes) == 1 and size <= PAIRWISE:
        return _pairwise(key, valid, count, axes[0])
    bits = 16 if scores.dtype == jnp.bfloat16 else 8 * key.dtype.itemsize
    return _search(key, valid, count, axes, bits)
