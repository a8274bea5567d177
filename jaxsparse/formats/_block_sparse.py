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
from jaxsparse.formats._break_even import goes_dense
from jaxsparse.formats._probe import Probe, attach
from jaxsparse.formats._protocol import multiply_slices
from jaxsparse.formats._sharded import multiply_rows
from jaxsparse.formats._tiles import block_map_of, grid_of, take, tiles_of
from jaxsparse.patterns import kept_units
from pallas_kernels import Topology, block_sparse_matmul, check_topology, plan, todense
from pallas_kernels._block_sparse_matmul import product_type


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "topology", "probe"],
    meta_fields=["transposed", "dense_above"],
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
        dense_above: Static; density (slots over all blocks) above which `x @ w` makes the dense
            weight and multiplies with it, which takes the memory of it. None: the density measured
            on this kind of device for blocks of this size (`jaxsparse/break_even.json`), and never
            where nobody has measured it; 1: never. Logged once (logger "jaxsparse").

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
    dense_above: float | None = None

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
            if goes_dense(w.block, w.topology.slots, w.topology.grid, w.dense_above):
                if isinstance(w.topology.rows, Tracer):
                    check_topology(w.topology)  # for checkify, as block_sparse_matmul does
                dtype = product_type(x, w.values)
                y = x.astype(dtype) @ w.todense().astype(dtype)
            else:
                y = block_sparse_matmul(x, w.values, w.topology, transpose=w.transposed)
            if w.probe is None:
                return y
            flat = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            rows: jax.Array = attach(w.transposed, *flat, w.probe)
            return rows.reshape(y.shape)

        def slices(w: BlockSparse, x: jax.Array) -> jax.Array:
            return multiply_slices(multiply, w, x, w.values.shape[:-3])

        return multiply_rows(slices, self, x)

    def shard(self, shards: int) -> BlockSparse:
        """The weight as a stack `[..., shards]` of its block columns, for `jsp.column_parallel`.

        Nothing moves: column c has its slots in order, so that each shard is a run of them.

        Args:
            shards: How many; they divide the block columns.

        Returns:
            Values `[..., shards, S/shards, bk, bn]`, and a topology of the columns of each shard.
            Of a weight that is transposed, the shards are row panels, for `jsp.row_parallel`.

        Raises:
            ValueError: If the columns do not divide, or do not all store as many blocks.

        Example:
            >>> import jax.numpy as jnp, jaxsparse as jsp
            >>> w = jsp.BlockSparse.from_rows(jnp.eye(4), (2, 2), jnp.array([[0], [1]])).shard(2)
            >>> w.shape, w.values.shape
            ((4, 2), (2, 1, 2, 2))
        """
        (r, c), fan_in = self.topology.grid, self.topology.fan_in
        if fan_in is None or self.probe is not None or shards < 1 or c % shards:
            raise ValueError(
                f"shard({shards}) needs a weight with as many blocks in every column (fan_in), "
                f"without a probe, of a multiple of {shards} block columns; got fan_in={fan_in} "
                f"and {c} columns. Make it with from_rows or random, and add probes to the shards."
            )
        shape = (*self.values.shape[:-3], shards, c // shards * fan_in)
        rows = self.topology.rows.reshape(shape)
        cols = jnp.broadcast_to(jnp.repeat(jnp.arange(c // shards), fan_in), shape)
        topology = plan(rows, cols, (r, c // shards), fan_in=fan_in)
        values = self.values.reshape(*shape, *self.block)
        return dataclasses.replace(self, values=values, topology=topology)

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
        grid, tiles = tiles_of(w, block)
        chosen = block_map_of(tiles, w.shape, block, grid, mask)
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
        return cls(take(tiles, rows, cols), plan(rows, cols, grid, fan_in=fan_in))

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
        grid, tiles = tiles_of(jnp.asarray(w), block)
        *lead, c, fan_in = rows.shape
        cols = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32)[:, None], rows.shape)
        rows, cols = (a.reshape(*lead, c * fan_in) for a in (rows, cols))
        return cls(take(tiles, rows, cols), plan(rows, cols, grid, fan_in=fan_in))

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
        (r, c), bk = grid_of(shape, block), block[0]
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
