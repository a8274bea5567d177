"""A linear layer whose weight is stored as blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse.formats._block_sparse import BlockSparse, best_rows
from jaxsparse.patterns import Block


class Blocks(nnx.Variable):
    """Where stored blocks stand: integers, which no optimizer trains."""


class SparseLinear(nnx.Module):
    """y = x W + b with W [in, out] stored as blocks, the same number in every block column.

    Takes part in training like any layer: `values` and `bias` are `nnx.Param`, so `nnx.Optimizer`
    with any Optax optimizer trains them, and gradients and moments are of the size of the blocks.
    The blocks stay where they are; to move them while training see `jaxsparse.block_rigl`.

    Attributes:
        values: `nnx.Param` `[S, bk, bn]`.
        blocks: `Blocks`, the `Topology`.
        bias: `nnx.Param` `[out]`, or None.
        dense_above: Density above which the dense weight is made for each product, as for
            `BlockSparse`: None follows what was measured on the device, 1 never does so.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> from flax import nnx
        >>> layer = jsp.nn.SparseLinear(64, 32, block=(16, 16), density=0.25, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape, layer.values.shape
        ((2, 32), (2, 16, 16))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block: tuple[int, int],
        density: float,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        dense_above: float | None = None,
        rngs: nnx.Rngs,
    ):
        """Random blocks with values of variance 1 / (stored inputs of an output), bias zero.

        Args:
            in_features: K.
            out_features: N.
            block: (bk, bn), which divide K and N.
            density: Share of blocks stored, in (0, 1]; at least one in every column.
            use_bias: Whether to add a bias.
            dtype: Of the computation; that of x and the values if not given.
            param_dtype: Of values and bias.
            dense_above: Density above which the dense weight is made for each product; by device
                and block if not given.
            rngs: Random streams; `params` is used.
        """
        weight = BlockSparse.random(
            rngs.params(),
            (in_features, out_features),
            block=block,
            density=density,
            dtype=param_dtype,
        )
        self.values = nnx.Param(weight.values)
        self.blocks = Blocks(weight.topology)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None
        self.dtype = dtype
        self.dense_above = dense_above

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, *, block: tuple[int, int], density: float
    ) -> SparseLinear:
        """The blocks of largest magnitude of an `nnx.Linear`, the same number in every column.

        Args:
            linear: The layer; it is left as it is.
            block: (bk, bn), which divide its kernel.
            density: Share of blocks stored, in (0, 1]; at least one in every column.

        Raises:
            ValueError: If blocks do not divide the kernel, or density lies outside (0, 1].
        """
        kernel = linear.kernel.get_value()
        layer = cls(
            *kernel.shape,
            block=block,
            density=density,
            use_bias=linear.bias is not None,
            dtype=linear.dtype,
            param_dtype=kernel.dtype,
            rngs=nnx.Rngs(0),
        )
        scores = Block(block).gather(jnp.abs(kernel))
        weight = BlockSparse.from_rows(kernel, block, best_rows(scores, density))
        layer.values.set_value(weight.values)
        layer.blocks.set_value(weight.topology)
        if layer.bias is not None and linear.bias is not None:
            layer.bias.set_value(linear.bias.get_value())
        return layer

    @property
    def weight(self) -> BlockSparse:
        """The weight, for `x @ layer.weight`, `todense()` and the like."""
        values, topology = self.values.get_value(), self.blocks.get_value()
        return BlockSparse(values, topology, dense_above=self.dense_above)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., K]` -> `[..., N]`."""
        weight, bias = self.weight, None if self.bias is None else self.bias.get_value()
        if self.dtype is not None:
            x, weight = x.astype(self.dtype), weight.astype(self.dtype)
        y = x @ weight
        return y if bias is None else y + bias.astype(y.dtype)
