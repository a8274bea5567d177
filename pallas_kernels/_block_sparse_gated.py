"""act(x Wg) * (x Wu) for two weights stored as blocks: the first half of a gated MLP in one go.

With g = x Wg and u = x Wu, y = act(g) u, du = act(g) dy, dg = act'(g) u dy, dx = dg Wg^T + du Wu^T,
and the gradients of values are products at the stored blocks, see `_block_sparse_matmul.py`. 2 M bk
bn FLOPs a stored block forward and twice that backward. Two products and an elementwise one write
g and u [M, N] to memory and read them again; here they stay on the chip unless the backward pass
needs them.

The MLP of Okanovic et al., BLaST: High performance inference and pretraining using block sparse
transformers, 2025, arXiv:2507.03117. Gated linear units: Shazeer, 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _block_sparse_gated_xla as xla
from pallas_kernels import _block_sparse_matmul as matmul
from pallas_kernels._block_sparse_gated_xla import Activation, Weight, gated, slopes
from pallas_kernels._block_sparse_matmul import (
    check,
    fallback,
    fitting,
    product_type,
    stored_for,
)
from pallas_kernels._op import KernelOp, choose, vary_alike
from pallas_kernels._topology import Topology


class Implementation(NamedTuple):
    """What an implementation is made of; x [M, K], dy [M, N], a weight (values, topology).

    Attributes:
        forward: (x, gate, up, activation) -> y.
        keeping: The same -> y, x @ Wg, x @ Wu.
        gradients: (x, dy, x @ Wg, x @ Wu, gate, up, activation) -> gradients of x and of the values
            of both.
    """

    forward: Callable[..., jax.Array]
    keeping: Callable[..., tuple[jax.Array, ...]]
    gradients: Callable[..., tuple[jax.Array, ...]]


def two_products(name: str) -> Implementation:
    """One weight after the other, by an implementation of `block_sparse_matmul`."""
    single = matmul.IMPLEMENTATIONS[name]

    def forward(x: jax.Array, gate: Weight, up: Weight, activation: Activation) -> jax.Array:
        a = single.matmul(x, *gate, False, activation=activation)
        return a * single.matmul(x, *up, False)

    def keeping(x: jax.Array, gate: Weight, up: Weight, activation: Activation) -> Any:
        g, u = single.matmul(x, *gate, False), single.matmul(x, *up, False)
        return gated(g, u, activation), g, u

    def gradients(
        x: jax.Array,
        dy: jax.Array,
        g: jax.Array,
        u: jax.Array,
        gate: Weight,
        up: Weight,
        activation: Activation,
    ) -> Any:
        dg, du = slopes(g, u, dy, activation)
        dx, dgate = single.gradients(x, dg, *gate)
        more, dup = single.gradients(x, du, *up)
        return dx + more, dgate, dup

    return Implementation(forward, keeping, gradients)


def _tpu_forward(*operands: Any) -> jax.Array:
    from pallas_kernels import _block_sparse_gated_tpu  # late: Pallas takes 70 ms to import

    return _block_sparse_gated_tpu.forward(*operands)


IMPLEMENTATIONS = {
    "xla": Implementation(
        lambda *a: xla.forward(*a)[0], lambda *a: xla.forward(*a, keep=True), xla.gradients
    ),
    "tpu": two_products("tpu")._replace(forward=_tpu_forward),
    "gpu": two_products("gpu"),
}


def block_sparse_gated(
    x: jax.Array,
    gate_values: jax.Array,
    gate_topology: Topology,
    up_values: jax.Array,
    up_topology: Topology,
    *,
    activation: Activation = jax.nn.silu,
    implementation: str | None = None,
) -> jax.Array:
    """activation(x @ Wg) * (x @ Wu) for weights [K, N] stored as blocks of one size.

    The two store blocks in different places, and may store different numbers of them.
    Differentiable in x and both values.

    Args:
        x: `[..., K]`, any number of rows.
        gate_values: `[Sg, bk, bn]` of Wg, the weight under the activation; dtypes as in
            `block_sparse_matmul`.
        gate_topology: From `plan`, for Sg slots.
        up_values: `[Su, bk, bn]` of Wu, of the dtype of `gate_values`.
        up_topology: From `plan`, for Su slots, on the same grid.
        activation: A function of entries without parameters of its own. It is static: give the same
            function each time, not a new lambda, or jit compiles again.
        implementation: "tpu", "gpu" or "xla"; chosen by device if not given.

    Returns:
        `[..., N]`; sums, activation and product are float32 or wider.

    Raises:
        ValueError: If shapes do not fit, or there is no such implementation.
        TypeError: If dtypes differ, or 8-bit values meet an x that is not a wider float.
        NotImplementedError: If the device cannot run `implementation`.

    Example:
        >>> from pallas_kernels import block_sparse_gated, plan
        >>> gate, up = (plan(jnp.array([row]), jnp.array([0]), (2, 1)) for row in (0, 1))
        >>> x, blocks = jnp.array([[-1.0, 3.0]]), jnp.ones((1, 1, 1))
        >>> block_sparse_gated(-x, blocks, gate, blocks, up, activation=jax.nn.relu)
        Array([[-3.]], dtype=float32)

    Cost: without differentiation, nothing beyond the result in "tpu" and, where every column of a
    weight stores as many blocks, at most 16, in "xla"; otherwise one array `[M, N]`. Under
    differentiation x, g and u `[M, N]` of the dtype of the result are kept; under `jax.checkpoint`
    only x, for two products more. Backward, dg and du are whole except in "xla" with such columns.

    References: Okanovic et al., BLaST, 2025, arXiv:2507.03117.
    """
    choice = choose("block_sparse_gated", IMPLEMENTATIONS, implementation)
    gate, up = Weight(gate_values, gate_topology), Weight(up_values, up_topology)
    for weight in (gate, up):
        check(x, *weight)
    _check_alike(gate, up)
    dtype = product_type(x, gate.values)
    if implementation is None:
        choice = fallback(choice, dtype, gate.values, up.values)
    n = gate.topology.grid[1] * gate.values.shape[2]
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if not gate.values.shape[0] or not up.values.shape[0] or not rows.size:
        # One factor is zero, but activation(0) need not be, nor finite.
        zero = partial(jnp.zeros, (rows.shape[0], n), dtype)
        g, u = (
            matmul.block_sparse_matmul(rows, *w, implementation=choice)
            if w.values.shape[0]
            else zero()
            for w in (gate, up)
        )
        return gated(g, u, activation).reshape(*x.shape[:-1], n)
    if implementation is None:
        topologies = gate.topology, up.topology
        choice = fitting(choice, rows.shape[0], gate.values, dtype, *topologies)
    rows, *values = vary_alike(
        rows,
        *(stored_for(choice, w.values, dtype) for w in (gate, up)),
        gate.topology.rows,
        up.topology.rows,
    )[:3]
    y: jax.Array = _gated(
        choice, activation, rows, values[0], gate.topology, values[1], up.topology
    )
    return y.reshape(*x.shape[:-1], n)


def _check_alike(gate: Weight, up: Weight) -> None:
    shapes = [(w.topology.grid, w.values.shape[1:]) for w in (gate, up)]
    if shapes[0] != shapes[1]:
        ((gr, gc), (gk, gn)), ((ur, uc), (uk, un)) = shapes
        raise ValueError(
            f"gate has {gr} x {gc} blocks of {gk} x {gn}, up has {ur} x {uc} of {uk} x {un}; they "
            "must be alike. Take block_sparse_matmul twice for weights in other blocks."
        )
    if gate.values.dtype != up.values.dtype:
        raise TypeError(
            f"gate and up must be of one dtype; got {gate.values.dtype} and {up.values.dtype}."
        )


def _parts(choice: str, gate: Topology, up: Topology) -> Implementation:
    whole = choice != "xla" or xla.supports(gate, up)
    return IMPLEMENTATIONS[choice] if whole else two_products(choice)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(
    choice: str,
    activation: Activation,
    x: jax.Array,
    gate: jax.Array,
    gate_topology: Topology,
    up: jax.Array,
    up_topology: Topology,
) -> jax.Array:
    parts = _parts(choice, gate_topology, up_topology)
    return parts.forward(x, Weight(gate, gate_topology), Weight(up, up_topology), activation)


def _gated_forward(choice, activation, x, gate, gate_topology, up, up_topology):
    parts = _parts(choice, gate_topology, up_topology)
    weights = Weight(gate, gate_topology), Weight(up, up_topology)
    y, g, u = parts.keeping(x, *weights, activation)
    return y, (x, g, u, *weights)


def _gated_backward(choice, activation, saved, dy):
    x, g, u, gate, up = saved
    parts = _parts(choice, gate.topology, up.topology)
    dx, dgate, dup = parts.gradients(x, dy, g, u, gate, up, activation)
    return dx, dgate, None, dup, None


_gated.defvjp(_gated_forward, _gated_backward)


def reference(
    x: jax.Array,
    gate_values: jax.Array,
    gate_topology: Topology,
    up_values: jax.Array,
    up_topology: Topology,
    *,
    activation: Activation = jax.nn.silu,
) -> jax.Array:
    """The same through the dense weights, in float32 at the highest precision."""
    dtype, wide = product_type(x, gate_values), x.astype(jnp.float32)
    g, u = (
        matmul.reference(wide, values.astype(jnp.float32), topology)
        for values, topology in ((gate_values, gate_topology), (up_values, up_topology))
    )
    return (activation(g) * u).astype(dtype)


CASES = matmul.CASES

OP = KernelOp("block_sparse_gated", block_sparse_gated, reference, IMPLEMENTATIONS, CASES)
