"""Which weights live or die together (units), and which compete for a place (groups).

A pattern turns the scores of one weight `[..., K, N]` into scores of units and says along which
axes units compete; `make_mask` keeps the same share of units in every group. Leading axes (scanned
layers, experts, seeds) are never part of a group: each slice has its own budget.

Nothing is flattened, so that a sharded weight stays sharded: `gather` only splits axes and sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxsparse import _tree, select
from jaxsparse._regular import keep_regular


@runtime_checkable
class Pattern(Protocol):
    """Structure of a mask. Must be hashable: a frozen dataclass.

    A pattern whose choice is not the top of each group also has a method `keep(gathered, count)`,
    which gives the kept units in the shape of `gathered`; see `TransposableNM`.

    Example:
        >>> import jaxsparse as jsp
        >>> isinstance(jsp.Block((2, 2)), jsp.Pattern)
        True
    """

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the gathered scores within which units compete: negative, ascending."""
        ...

    def gather(self, scores: jax.Array) -> jax.Array:
        """Scores of units from scores of weights `[..., K, N]`; ValueError if they do not fit."""
        ...

    def scatter(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mask of a weight of `shape` from the kept units."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight is a unit and competes with all others of its matrix.

    Attributes:
        ndim: Trailing axes that form one weight; 4 for a convolution `[h, w, in, out]`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.make_mask(jsp.Unstructured(), jnp.array([[3.0, 1.0], [2.0, 4.0]]), 0.5)
        Array([[ True, False],
               [False,  True]], dtype=bool)
    """

    ndim: int = 2

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(-self.ndim, 0))

    def gather(self, scores: jax.Array) -> jax.Array:
        return _at_least(scores, self.ndim, self)

    def scatter(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return keep.reshape(shape)


@dataclasses.dataclass(frozen=True)
class NM:
    """`n` weights kept of every `m` consecutive ones along `axis`.

    Attributes:
        n: Weights kept in each group.
        m: Size of a group.
        axis: Axis along which groups lie: -2, the inputs of a weight `[..., in, out]`, or -1.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> scores = jnp.array([[1.0, 5.0, 3.0, 4.0]])
        >>> jsp.make_mask(jsp.NM(2, 4, axis=-1), scores, 0.5)
        Array([[False,  True, False,  True]], dtype=bool)
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ValueError(f"NM(n, m) keeps n of m, so 0 < n <= m; got n={self.n}, m={self.m}.")
        if self.axis not in (-1, -2):
            raise ValueError(f"NM(axis=) must be -2 (inputs) or -1 (outputs); got {self.axis}.")

    @property
    def axes(self) -> tuple[int, ...]:
        return (self.axis,)

    def gather(self, scores: jax.Array) -> jax.Array:
        shape = _at_least(scores, 2, self).shape
        size = shape[self.axis]
        if size % self.m:
            raise ValueError(
                f"NM({self.n}, {self.m}) needs axis {self.axis} to be a multiple of {self.m}; got "
                f"{shape}. Pad it, choose axis={-3 - self.axis}, or exclude it with where=."
            )
        at = len(shape) + self.axis
        return scores.reshape(*shape[:at], size // self.m, self.m, *shape[at + 1 :])

    def scatter(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return keep.reshape(shape)


@dataclasses.dataclass(frozen=True)
class TransposableNM(NM):
    """`n` weights kept of every `m` along the inputs and along the outputs.

    So the transpose, which the backward pass multiplies with, is n:m too. Each m x m square is on
    its own. Up to m = 4 its mask is the best there is (of 90 for 2:4); for larger m it is greedy,
    filled up by exchanges (`jaxsparse._regular`).

    Attributes:
        n: Weights kept in each row and each column of a square.
        m: Size of a square.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> scores = jnp.array([[5.0, 4.0], [4.0, 1.0]])
        >>> jsp.make_mask(jsp.TransposableNM(1, 2), scores, 0.5)
        Array([[False,  True],
               [ True, False]], dtype=bool)

    Cost: for m = 4 two products of the scores with 140 patterns, and 4 floats a weight of temporary
    memory; measured on 2 CPU cores, 2048 x 2048: 105 ms for 2:4 and 440 ms for the greedy 4:8,
    where `NM` takes 3.4 ms. Choose such masks now and then, e.g. every 40 steps.

    Deviations: checked against the authors' code for 2:4 (the same 90 patterns). For larger m
    Hubara et al. give a minimum-cost flow and a 2-approximation; the greedy choice with exchanges
    is ours, and keeps exactly n of each row and column.

    References: Hubara et al., Accelerated sparse neural training, 2021, arXiv:2102.08124; for 2:4
    by all 90 patterns Hu et al., 2024, arXiv:2404.01847.
    """

    axis: int = dataclasses.field(default=-2, init=False, repr=False)

    def gather(self, scores: jax.Array) -> jax.Array:
        shape = _at_least(scores, 2, self).shape
        if shape[-2] % self.m or shape[-1] % self.m:
            raise ValueError(
                f"{self} needs the last two axes to be multiples of {self.m}; got {shape}. Pad it, "
                f"use NM({self.n}, {self.m}), or exclude it with where=."
            )
        return super().gather(scores)

    def keep(self, gathered: jax.Array, count: jax.Array) -> jax.Array:
        """Kept weights `[..., K / m, m, N]`; `count` broadcasts to that, with 1 for the m."""
        *lead, rows, m, n = gathered.shape
        squares = jnp.swapaxes(gathered.reshape(*lead, rows, m, n // m, m), -2, -3)
        count = jnp.broadcast_to(count, (*lead, rows, 1, n)).reshape(*lead, rows, n // m, m)
        keep = keep_regular(squares, jnp.max(count, -1))
        return jnp.swapaxes(keep, -2, -3).reshape(gathered.shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of `bk x bn` weights; a block scores the sum of its weights.

    Attributes:
        shape: (bk, bn), along the inputs and the outputs.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.make_mask(jsp.Block((1, 2)), jnp.array([[3.0, 0.0, 1.0, 1.0]]), 0.5)
        Array([[ True,  True, False, False]], dtype=bool)
    """

    shape: tuple[int, int]

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"Block needs two positive sizes (bk, bn); got {self.shape}.")

    @property
    def axes(self) -> tuple[int, ...]:
        return (-2, -1)

    def gather(self, scores: jax.Array) -> jax.Array:
        *lead, k, n = _at_least(scores, 2, self).shape
        bk, bn = self.shape
        if k % bk or n % bn:
            raise ValueError(
                f"Block({self.shape}) needs the last two axes to be multiples of {self.shape}; got "
                f"{scores.shape}. Pad it, choose another block, or exclude it with where=."
            )
        return _sum(scores.reshape(*lead, k // bk, bk, n // bn, bn), (-3, -1))

    def scatter(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        *lead, rows, columns = keep.shape
        blocks = (*lead, rows, self.shape[0], columns, self.shape[1])
        return jnp.broadcast_to(keep[..., :, None, :, None], blocks).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Channel:
    """Whole slices along `axis`: -1 removes outputs, -2 removes inputs.

    Attributes:
        axis: The axis that loses entries.
        ndim: Trailing axes that form one weight; 4 for a convolution `[h, w, in, out]`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.make_mask(jsp.Channel(-1), jnp.array([[3.0, 1.0], [0.0, 1.0]]), 0.5)
        Array([[ True, False],
               [ True, False]], dtype=bool)
    """

    axis: int
    ndim: int = 2

    def __post_init__(self):
        if not -self.ndim <= self.axis < 0:
            raise ValueError(
                f"Channel(axis=) counts from the end, -{self.ndim} to -1, so that stacked axes do "
                f"not shift it; got {self.axis}."
            )

    @property
    def axes(self) -> tuple[int, ...]:
        return (self.axis,)

    def gather(self, scores: jax.Array) -> jax.Array:
        others = tuple(a for a in range(-self.ndim, 0) if a != self.axis)
        return _sum(_at_least(scores, self.ndim, self), others, keepdims=True)

    def scatter(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(keep, shape)


@dataclasses.dataclass(frozen=True)
class FanIn:
    """The same number of kept inputs (axis -2) for every output (axis -1).

    Attributes:
        ndim: Trailing axes that form one weight, the last of them the outputs.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.make_mask(jsp.FanIn(), jnp.array([[3.0, 1.0], [2.0, 4.0]]), 0.5)
        Array([[ True, False],
               [False,  True]], dtype=bool)
    """

    ndim: int = 2

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(-self.ndim, -1))

    def gather(self, scores: jax.Array) -> jax.Array:
        return _at_least(scores, self.ndim, self)

    def scatter(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return keep.reshape(shape)


def _at_least(scores: jax.Array, ndim: int, pattern: Pattern) -> jax.Array:
    if scores.ndim < ndim:
        raise ValueError(
            f"{pattern} needs at least {ndim} axes; got {scores.shape}. Exclude it with where=."
        )
    return scores


def _sum(scores: jax.Array, axes: tuple[int, ...], keepdims: bool = False) -> jax.Array:
    """Sum in float32 at least; a NaN or an infinity spreads to its unit."""
    wide = scores.dtype if scores.dtype in (jnp.float32, jnp.float64) else jnp.float32
    return jnp.sum(scores.astype(wide), axes, keepdims=keepdims)


def units(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many units compete in one group of a weight of `shape`."""
    gathered = jax.eval_shape(pattern.gather, jax.ShapeDtypeStruct(shape, jnp.float32))
    return math.prod(gathered.shape[a] for a in pattern.axes)


def kept_units(density: jax.Array | float, size: int) -> jax.Array | int:
    """`density * size` rounded half to even; in Python, so exact, when density is a number."""
    if isinstance(density, (int, float)):
        if not 0 <= density <= 1:
            raise ValueError(f"density is the share of weights kept, 0 to 1; got {density}.")
        return round(density * size)
    return jnp.round(jnp.asarray(density, jnp.float32) * size).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def mask_of_count(pattern: Pattern, scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """The `count` units of largest score in each group, as a mask of the weight.

    Args:
        pattern: Units and groups.
        scores: `[..., K, N]`.
        count: int32 scalar, one per leading slice, or of the gathered shape with 1 along the
            competing axes.

    Returns:
        bool, shape and sharding of `scores`.
    """

    def select_units(scores: jax.Array, count: jax.Array) -> jax.Array:
        gathered = pattern.gather(scores)
        count = count.reshape(count.shape + (1,) * (gathered.ndim - count.ndim))
        own = getattr(pattern, "keep", None)
        keep = (
            select.keep_top(gathered, count, pattern.axes) if own is None else own(gathered, count)
        )
        mask = pattern.scatter(keep, scores.shape)
        # Units of several weights: no NaN is in a kept one, but now the mask depends on the scores,
        # entry by entry, and the compiler puts it where they are.
        return mask if gathered.size == scores.size else mask & (scores == scores)

    return _tree.in_auto_mode(select_units, scores, jnp.asarray(count, jnp.int32))


def make_mask(pattern: Pattern, scores: jax.Array, density: jax.Array | float) -> jax.Array:
    """Keep the units of largest score: `round(density * units)` of every group, exactly.

    Ties go to the lowest index in the group; NaN is never kept. Leading stacked axes are handled
    slice by slice.

    Args:
        pattern: Units and groups; see `Unstructured`, `NM`, `Block`, `Channel`, `FanIn`.
        scores: `[..., K, N]`, any real dtype.
        density: Share kept, 0 to 1. A number, or a traced scalar, or one value per leading slice;
            a new value never recompiles. Traced densities are float32, whose rounding can move the
            count of a group of more than 2**24 units.

    Returns:
        A bool mask of the shape and sharding of `scores`, True = kept.

    Raises:
        ValueError: If the shape does not fit the pattern, or density lies outside [0, 1].
        TypeError: If the scores are complex.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.make_mask(jsp.NM(1, 2), jnp.array([[1.0], [2.0], [2.0], [2.0]]), 0.5)[:, 0]
        Array([False,  True,  True, False], dtype=bool)

    Cost: 1 to 32 passes over the scores, no sort; see `jaxsparse.select`.
    """
    scores = jnp.asarray(scores)
    return mask_of_count(pattern, scores, kept_units(density, units(pattern, scores.shape)))
