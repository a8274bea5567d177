"""A gated MLP whose weights are stored as blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse.formats._gated import gated_product
from jaxsparse.nn._sparse_linear import SparseLinear


class SparseGatedMLP(nnx.Module):
    """down(activation(gate x) * up x), three weights stored as blocks.

    With silu the SwiGLU of most language models. Gate and up store their own blocks, and both
    products, the activation and the product of the two are one operation.

    Attributes:
        gate: `SparseLinear` `[features, hidden]` without bias.
        up: `SparseLinear` `[features, hidden]` without bias.
        down: `SparseLinear` `[hidden, features]` without bias.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> from flax import nnx
        >>> mlp = jsp.nn.SparseGatedMLP(32, 64, block=(8, 8), density=0.25, rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 32))).shape, mlp.gate.values.shape
        ((2, 32), (8, 8, 8))

    References: Shazeer, GLU variants improve transformer, 2020, arXiv:2002.05202. Okanovic et al.,
    BLaST, 2025, arXiv:2507.03117.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        block: tuple[int, int],
        density: float,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Random blocks, as in `SparseLinear`.

        Args:
            features: Size of input and output.
            hidden: Size in between.
            block: (bk, bn); both divide features and hidden.
            density: Share of blocks stored, in (0, 1]; at least one in every column.
            activation: Of the gate, a function of entries.
            dtype: Of the computation; that of x and the values if not given.
            param_dtype: Of values.
            rngs: Random streams; `params` is used.

        Raises:
            ValueError: If blocks do not divide a weight, or density lies outside (0, 1].
        """

        def linear(k: int, n: int) -> SparseLinear:
            return SparseLinear(
                k,
                n,
                block=block,
                density=density,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.gate, self.up = linear(features, hidden), linear(features, hidden)
        self.down = linear(hidden, features)
        self.activation = activation
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., features]` -> `[..., features]`."""
        gate, up = self.gate.weight, self.up.weight
        if self.dtype is not None:
            x, gate, up = x.astype(self.dtype), gate.astype(self.dtype), up.astype(self.dtype)
        return self.down(gated_product(x, gate, up, activation=self.activation))
