"""A weight of which only some blocks are stored: `x @ w` costs what the stored blocks cost."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxsparse import select
from jaxsparse.formats._probe import Probe, attach
from jaxsparse.formats._protocol import multiply_slices
from jaxsparse.patterns import kept_units
from pallas_kernels import Topology, block_sparse_matmul, plan, todense


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "topology", "probe"],
    meta_fields=["transposed"],
)
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A weight [K, N] stored as blocks [bk, bn]; leading axes are stacked weights.

    Works wherever a layer says `x @ w`. Differentiable in `values`; the topology is integers, made
    on the device, and may change under jit without a recompile.

    Attributes:
        values: `[..., S, bk, bn]`, the stored blocks in any order.
        topology: Where each slot stands, and the orders in which kernels visit slots.
        probe: If given, the backward pass of `x @ w` also measures the gradient of every block.
        transposed: Static; stands for W^T.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> w = jsp.BlockSparse.from_dense(jnp.eye(4), (2, 2))
        >>> w.shape, w.values.shape, float(w.density)
        ((4, 4), (2, 2, 2), 0.5)
        >>> jnp.arange(4.0) @ w
        Array([0., 1., 2., 3.], dtype=float32)
    """

    values: jax.Array
    topology: Topology
    probe: Probe | None = None
    transposed: bool = False

    __array_ufunc__ = None  # numpy_array @ w calls __rmatmul__

    @property
    def block(self) -> tuple[int, int]:
        """(bk, bn) as stored, whether transposed or not."""
        return self.values.shape[-2], self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N) of one slice; (N, K) when transposed."""
        (r, c), (bk, bn) = self.topology.grid, self.block
        return (c * bn, r * bk) if self.transposed else (r * bk, c * bn)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def density(self) -> jax.Array:
        """Stored blocks in use over all blocks, float32 `[...]`."""
        return self.topology.count / math.prod(self.topology.grid)

    @property
    def T(self) -> BlockSparse:  # noqa: N802
        """The transposed weight; nothing is copied."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def astype(self, dtype: Any) -> BlockSparse:
        """With values of another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def todense(self) -> jax.Array:
        """The dense weight `[..., K, N]`; zero where nothing is stored."""
        w = todense(self.values, self.topology)
        return w.swapaxes(-1, -2) if self.transposed else w

    def __rmatmul__(self, x: Any) -> jax.Array:
        """`x @ w`: `[..., K]` -> `[..., N]`; leading axes of a stack must lead in x too."""

        def multiply(w: BlockSparse, x: jax.Array) -> jax.Array:
            y = block_sparse_matmul(x, w.values, w.topology, transpose=w.transposed)
            if w.probe is None or w.transposed:
                return y
            rows = attach(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), w.probe)
            return rows.reshape(y.shape)

        return multiply_slices(multiply, self, x, self.values.shape[:-3])

    @classmethod
    def from_dense(
        cls,
        w: jax.Array,
        block: tuple[int, int],
        mask: jax.Array | None = None,
        capacity: int | None = None,
    ) -> BlockSparse:
        """Store the blocks of a dense weight.

        Args:
            w: `[..., K, N]`.
            block: (bk, bn), which divide K and N.
            mask: Blocks to store: bool `[..., K, N]`, the same within each block, or a block map
                `[..., K/bk, N/bn]`. Blocks that are not all zero if not given.
            capacity: Slots of each slice; as many as are needed if not given, which must be known,
                so under jit it is required. Blocks beyond the capacity raise; under jit, where
                that cannot be known, the last ones by column and row are left out.

        Returns:
            The weight. Slots lie column by column; if every column stores as many blocks, and no
            capacity is given, its topology has a `fan_in`.

        Raises:
            ValueError: If blocks do not divide the shape, the mask does not fit or differs within a
                block, or blocks exceed the capacity.

        Example:
            >>> import jax.numpy as jnp, jaxsparse as jsp
            >>> blocks = jnp.array([[True, False]])
            >>> jsp.BlockSparse.from_dense(jnp.ones((2, 4)), (2, 2), mask=blocks).todense()[0]
            Array([1., 1., 0., 0.], dtype=float32)
        """
        w = jnp.asarray(w)
        grid, tiles = _tiles(w, block)
        chosen = _block_map(tiles, w.shape, block, grid, mask)
        known = not isinstance(chosen, Tracer)
        fan_in = None
        if known:
            by_column = np.asarray(chosen).sum(-2)
            most = int(by_column.sum(-1).max(initial=0))
            if capacity is None:
                counts = set(by_column.reshape(-1).tolist())
                fan_in = counts.pop() if len(counts) == 1 else None
            elif most > capacity:
                raise ValueError(
                    f"{most} blocks are to be stored, but the capacity is {capacity} slots a "
                    "slice. Give more, or leave capacity out."
                )
            capacity = most if capacity is None else capacity
        elif capacity is None:
            raise ValueError(
                "from_dense needs capacity= under jit, where the number of blocks is not known."
            )
        r, c = grid

        def place(chosen: jax.Array) -> jax.Array:
            flat = chosen.T.reshape(-1)  # by column, then row
            return jnp.nonzero(flat, size=capacity, fill_value=r * c)[0].astype(jnp.int32)

        for _ in w.shape[:-2]:
            place = jax.vmap(place)
        at = place(chosen)
        rows, cols = jnp.where(at < r * c, at % r, r), jnp.minimum(at // r, c - 1)
        return cls(_take(tiles, rows, cols), plan(rows, cols, grid, fan_in=fan_in))

    @classmethod
    def from_rows(cls, w: jax.Array, block: tuple[int, int], rows: jax.Array) -> BlockSparse:
        """Store the same number of blocks of every block column.

        Args:
            w: `[..., K, N]`.
            block: (bk, bn), which divide K and N.
            rows: Integers `[..., N/bn, fan_in]`, block rows to store in each block column.

        Example:
            >>> import jax.numpy as jnp, jaxsparse as jsp
            >>> w = jsp.BlockSparse.from_rows(jnp.eye(4), (2, 2), jnp.array([[0], [1]]))
            >>> bool((w.todense() == jnp.eye(4)).all())
            True
        """
        grid, tiles = _tiles(jnp.asarray(w), block)
        *lead, c, fan_in = rows.shape
        cols = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32)[:, None], rows.shape)
        rows, cols = (a.reshape(*lead, c * fan_in) for a in (rows, cols))
        return cls(_take(tiles, rows, cols), plan(rows, cols, grid, fan_in=fan_in))

    @classmethod
    def random(
        cls,
        key: jax.Array,
        shape: tuple[int, ...],
        *,
        block: tuple[int, int],
        density: float,
        scale: float = 1.0,
        dtype: Any = jnp.float32,
    ) -> BlockSparse:
        """Random blocks of random values, as many in every block column; never makes W.

        Args:
            key: Random key.
            shape: `(..., K, N)`.
            block: (bk, bn), which divide K and N.
            density: Share of blocks stored; at least one in each column.
            scale: Values have variance scale^2 / (stored inputs of an output), so that x @ w varies
                as with a dense weight of variance scale^2 / K.
            dtype: Of the values.

        Returns:
            The weight, with `fan_in = max(1, round(density * K / bk))`.

        Raises:
            ValueError: If blocks do not divide the shape, or density lies outside (0, 1].

        Example:
            >>> import jax, jaxsparse as jsp
            >>> w = jsp.BlockSparse.random(jax.random.key(0), (8, 4), block=(2, 2), density=0.25)
            >>> w.topology.fan_in, w.values.shape
            (1, (2, 2, 2))

        References: Evci et al., Gradient flow in sparse neural networks, 2022, arXiv:2010.03533.
        """
        *lead, k, n = shape
        (r, c), bk = _grid(shape, block), block[0]
        if not 0 < density <= 1:
            raise ValueError(f"density is the share of blocks stored, in (0, 1]; got {density}.")
        fan_in = max(1, int(kept_units(density, r)))
        of_rows, of_values = jax.random.split(key)
        noise = jax.random.uniform(of_rows, (*lead, c, r))
        rows = jnp.sort(jnp.argsort(noise, -1)[..., :fan_in], -1).reshape(*lead, c * fan_in)
        cols = jnp.broadcast_to(jnp.repeat(jnp.arange(c), fan_in), rows.shape)
        values = jax.random.normal(of_values, (*rows.shape, *block), dtype)
        values = values * jnp.asarray(scale * (fan_in * bk) ** -0.5, dtype)
        return cls(values, plan(rows, cols, (r, c), fan_in=fan_in))


def best_rows(scores: jax.Array, density: float) -> jax.Array:
    """The rows of the best `density * R`, at least one, of every block column.

    Args:
        scores: Scores of blocks `[..., R, C]`.
        density: Share of blocks, in (0, 1].

    Returns:
        int32 `[..., C, fan_in]`, ascending.
    """
    fan_in = max(1, int(kept_units(density, scores.shape[-2])))
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)  # so that each column keeps its count
    keep = select.keep_top(scores, fan_in, (-2,)).swapaxes(-1, -2)
    return jnp.argsort(~keep, axis=-1, stable=True)[..., :fan_in].astype(jnp.int32)


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    if len(shape) < 2 or shape[-2] % block[0] or shape[-1] % block[1]:
        raise ValueError(
            f"blocks of {tuple(block)} do not divide a weight of shape {tuple(shape)}: its last "
            "two axes must be multiples of the block. Pad it, or choose another block."
        )
    return shape[-2] // block[0], shape[-1] // block[1]


def _tiles(w: jax.Array, block: tuple[int, int]) -> tuple[tuple[int, int], jax.Array]:
    """The grid (R, C), and `[..., R, C, bk, bn]`."""
    r, c = _grid(w.shape, block)
    tiles = w.reshape(*w.shape[:-2], r, block[0], c, block[1]).swapaxes(-3, -2)
    return (r, c), tiles


def _take(tiles: jax.Array, rows: jax.Array, cols: jax.Array) -> jax.Array:
    """The tiles `[..., R, C, bk, bn]` at `[..., S]` places; zero where there is none."""

    def one(tiles: jax.Array, rows: jax.Array, cols: jax.Array) -> jax.Array:
        return tiles.at[rows, cols].get(mode="fill", fill_value=0)

    for _ in rows.shape[:-1]:
        one = jax.vmap(one)
    return one(tiles, rows, cols)


def _block_map(
    tiles: jax.Array,
    shape: tuple[int, ...],
    block: tuple[int, int],
    grid: tuple[int, int],
    mask: Any,
) -> jax.Array:
    """Bool `[..., R, C]`: the blocks to store."""
    if mask is None:
        return jnp.any(tiles != 0, (-2, -1))
    mask = jnp.asarray(mask)
    lead = shape[:-2]
    if mask.dtype != jnp.bool_ or mask.shape not in ((*lead, *grid), shape):
        raise ValueError(
            f"mask must be bool, of the weight {shape} or a block map {(*lead, *grid)}; got "
            f"{mask.dtype} {mask.shape}."
        )
    if mask.shape == (*lead, *grid):
        return mask
    inside = _tiles(mask, block)[1]
    some = jnp.any(inside, (-2, -1))
    differs = some != jnp.all(inside, (-2, -1))
    if not isinstance(differs, Tracer) and bool(jnp.any(differs)):
        *_, row, column = (int(i[0]) for i in np.nonzero(np.asarray(differs)))
        raise ValueError(
            f"the mask differs within the block at block row {row}, block column {column}, so the "
            f"block {tuple(block)} cannot be stored or left out whole. Make masks with "
            f"Block({tuple(block)}), or give a block map."
        )
    return some
