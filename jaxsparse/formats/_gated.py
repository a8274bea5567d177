"""The gated product of a gated linear unit, for dense and sparse weights alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxsparse.formats._block_sparse import BlockSparse
from jaxsparse.formats._break_even import goes_dense
from jaxsparse.formats._protocol import multiply_slices
from jaxsparse.formats._sharded import multiply_rows
from pallas_kernels import block_sparse_gated


@partial(jax.tree_util.register_dataclass, data_fields=["gate", "up"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two weights that are multiplied together; to helpers of `x @ w` they look like one."""

    gate: BlockSparse
    up: BlockSparse

    @property
    def shape(self) -> tuple[int, int]:
        return self.gate.shape

    @property
    def values(self) -> jax.Array:
        return self.gate.values


def gated_product(
    x: Any, gate: Any, up: Any, *, activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
) -> jax.Array:
    """activation(x @ gate) * (x @ up), in one go where both weights are stored as blocks.

    The first half of a gated MLP (SwiGLU, GeGLU). A model that calls it takes arrays and sparse
    weights alike.

    Args:
        x: `[..., K]`; leading axes of a stack must lead in x too.
        gate: Weight (K, N) under the activation: an array, or anything with `x @ w`.
        up: Weight (K, N) of the other factor.
        activation: A function of entries without parameters of its own; it is static.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: If x does not fit a weight.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> gate, up = (jsp.BlockSparse.random(key, (8, 16), block=(2, 2), density=0.5)
        ...             for key in jax.random.split(jax.random.key(0)))
        >>> x = jnp.ones((3, 8))
        >>> y = jsp.gated_product(x, gate, up)
        >>> bool(jnp.allclose(y, jax.nn.silu(x @ gate) * (x @ up), atol=1e-6))
        True

    Cost: of two `BlockSparse` of one grid, block and dtype that are not transposed, carry no probe
    and are not computed dense, see `block_sparse_gated`: the factors stay on the chip, and what is
    rounded is the result alone. Else that of the three products.

    References: Shazeer, GLU variants improve transformer, 2020, arXiv:2002.05202. Okanovic et al.,
    BLaST, 2025, arXiv:2507.03117.
    """
    if not (_is_plain(gate) and _is_plain(up) and _are_alike(gate, up)):
        return activation(x @ gate) * (x @ up)

    def multiply(w: _Pair, x: jax.Array) -> jax.Array:
        return block_sparse_gated(
            x, w.gate.values, w.gate.topology, w.up.values, w.up.topology, activation=activation
        )

    def slices(w: _Pair, x: jax.Array) -> jax.Array:
        return multiply_slices(multiply, w, x, w.values.shape[:-3])

    return multiply_rows(slices, _Pair(gate, up), x)


def _is_plain(w: Any) -> bool:
    if not isinstance(w, BlockSparse) or w.transposed or w.probe is not None:
        return False
    return not goes_dense(w.block, w.topology.slots, w.topology.grid, w.dense_above)


def _are_alike(gate: BlockSparse, up: BlockSparse) -> bool:
    first, second = ((w.topology.grid, w.block, w.dtype, w.values.shape[:-3]) for w in (gate, up))
    return first == second
