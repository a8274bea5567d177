"""x @ W for a weight stored as blocks: forward, dX and dW at the stored blocks only.

y = x W, dx = dy W^T, dW_s = x[:, row(s)]^T dy[:, col(s)] for each stored block s: 2 M bk bn FLOPs a
block each, so with density d the floor is d times the dense products. Sums are float32. Layouts
and orders: `_topology.py`; each implementation states its own roofline.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels import _block_sparse_matmul_xla as xla
from pallas_kernels._op import KernelOp, choose
from pallas_kernels._topology import Topology, check_topology


class Implementation(NamedTuple):
    """What an implementation is made of; x [M, K], dy [M, N], values [S, bk, bn].

    Attributes:
        matmul: (x, values, topology, transpose) -> x @ W, or x @ W^T.
        gradients: (x, dy, values, topology) -> gradients of x and of the values for y = x @ W.
    """

    matmul: Any
    gradients: Any


def _tpu() -> Any:
    from pallas_kernels import _block_sparse_matmul_tpu  # late: Pallas takes 70 ms to import

    return _block_sparse_matmul_tpu


IMPLEMENTATIONS = {
    "xla": Implementation(xla.matmul, xla.gradients),
    "tpu": Implementation(lambda *a: _tpu().matmul(*a), lambda *a: _tpu().gradients(*a)),
}


def todense(values: jax.Array, topology: Topology) -> jax.Array:
    """The dense weight [..., K, N] of stored blocks [..., S, bk, bn].

    Example:
        >>> from pallas_kernels import plan, todense
        >>> todense(jnp.ones((1, 1, 2)), plan(jnp.array([1]), jnp.array([0]), (2, 2)))
        Array([[0., 0., 0., 0.],
               [1., 1., 0., 0.]], dtype=float32)
    """
    r, c = topology.grid
    bk, bn = values.shape[-2:]

    def one(values: jax.Array, rows: jax.Array, cols: jax.Array) -> jax.Array:
        grid = jnp.zeros((r, c, bk, bn), values.dtype).at[rows, cols].set(values, mode="drop")
        return grid.transpose(0, 2, 1, 3).reshape(r * bk, c * bn)

    for _ in values.shape[:-3]:
        one = jax.vmap(one)
    return one(values, topology.rows, topology.cols)


def block_sparse_matmul(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    *,
    transpose: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """X @ W, or x @ W^T, for a weight W [K, N] stored as blocks.

    Differentiable in x and values; the gradient of values is computed at the slots in use and is
    zero in the others, whose values are never read. A new topology of the same number of slots
    never recompiles.

    Args:
        x: `[..., K]`, or `[..., N]` with `transpose`; any number of rows.
        values: `[S, bk, bn]`, of the dtype of x or one that x is promoted to.
        topology: From `plan`, for S slots; no two slots in use may stand at one place.
        transpose: Multiply by W^T.
        implementation: "tpu", "gpu" or "xla"; chosen by device if not given.

    Returns:
        `[..., N]`, or `[..., K]` with `transpose`; sums are float32 or wider.

    Raises:
        ValueError: If shapes do not fit, or there is no such implementation.
        NotImplementedError: If the device cannot run `implementation`.

    Example:
        >>> from pallas_kernels import block_sparse_matmul, plan
        >>> topology = plan(jnp.array([1]), jnp.array([0]), (2, 2))
        >>> block_sparse_matmul(jnp.arange(4.0)[None], jnp.ones((1, 2, 2)), topology)
        Array([[5., 5., 0., 0.]], dtype=float32)

    Cost: see the head of the file of each implementation.
    """
    choice = choose("block_sparse_matmul", IMPLEMENTATIONS, implementation)
    _check(x, values, topology, transpose)
    if isinstance(topology.rows, Tracer):
        check_topology(topology)  # for checkify; else no work
    dtype = jnp.result_type(x, values)
    if implementation is None and choice == "tpu" and _tpu().supports(dtype, *values.shape[1:]):
        choice = "xla"
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if not values.shape[0] or not rows.size:
        size = (
            topology.grid[0] * values.shape[1] if transpose else topology.grid[1] * values.shape[2]
        )
        return jnp.zeros((*x.shape[:-1], size), dtype)
    y: jax.Array = _matmul(choice, transpose, rows, values.astype(dtype), topology)
    return y.reshape(*x.shape[:-1], -1)


def _check(x: jax.Array, values: jax.Array, topology: Topology, transpose: bool) -> None:
    if values.ndim != 3 or topology.rows.shape != values.shape[:1]:
        raise ValueError(
            f"values must be [S, bk, bn] for the {topology.rows.shape} slots of the topology; got "
            f"{values.shape}. Map over stacked weights with jax.vmap or scan."
        )
    (r, c), (_, bk, bn) = topology.grid, values.shape
    want = c * bn if transpose else r * bk
    if x.ndim < 1 or x.shape[-1] != want:
        raise ValueError(
            f"a weight of {r} x {c} blocks of {bk} x {bn} is ({r * bk}, {c * bn}), so the last "
            f"axis of x must be {want}; got {x.shape}."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    choice: str, transpose: bool, x: jax.Array, values: jax.Array, topology: Topology
) -> jax.Array:
    return IMPLEMENTATIONS[choice].matmul(x, values, topology, transpose)


def _matmul_forward(choice, transpose, x, values, topology):
    return _matmul(choice, transpose, x, values, topology), (x, values, topology)


def _matmul_backward(choice, transpose, saved, dy):
    x, values, topology = saved
    if not transpose:
        return *IMPLEMENTATIONS[choice].gradients(x, dy, values, topology), None
    # y = x W^T: W plays the same part with the roles of x and dy exchanged.
    dx = IMPLEMENTATIONS[choice].matmul(dy, values, topology, False)
    return dx, IMPLEMENTATIONS[choice].gradients(dy, x, values, topology)[1], None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def reference(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    *,
    transpose: bool = False,
) -> jax.Array:
    """The same through the dense weight, in float32 at the highest precision."""
    w = todense(values.astype(jnp.float32), topology)
    y = jnp.matmul(x.astype(jnp.float32), w.T if transpose else w, precision="highest")
    return y.astype(jnp.result_type(x, values))


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape that every implementation must handle.

    Attributes:
        name: What is special about it.
        m: Rows of x.
        grid: (R, C) blocks.
        block: (bk, bn).
        density: Share of blocks stored.
        fan_in: Whether every block column stores as many blocks, in its own slots.
        spare: Slots that are not in use.
        dtype: Of x and values.
        tolerance: Largest error over the largest entry of the reference.
    """

    name: str
    m: int
    grid: tuple[int, int]
    block: tuple[int, int]
    density: float
    fan_in: bool = True
    spare: int = 0
    dtype: str = "float32"
    tolerance: float = 1e-5


CASES = (
    Case("balanced", 256, (4, 6), (128, 128), 0.5),
    Case("ragged rows", 37, (4, 3), (128, 128), 0.5),
    Case("one row", 1, (2, 2), (128, 128), 0.5),
    Case("wide blocks", 64, (4, 2), (128, 256), 0.5),
    Case("tall blocks", 64, (2, 4), (256, 128), 0.5),
    Case("full", 64, (2, 3), (128, 128), 1.0),
    Case("nothing stored", 64, (2, 3), (128, 128), 0.0, fan_in=False, spare=2),
    Case("unbalanced, empty lines, spare slots", 128, (5, 4), (128, 128), 0.3, False, 5),
    Case("bf16", 256, (4, 4), (128, 128), 0.5, dtype="bfloat16", tolerance=1e-2),
    Case("bf16, unbalanced", 64, (4, 4), (128, 128), 0.4, False, 3, "bfloat16", 1e-2),
)

OP = KernelOp("block_sparse_matmul", block_sparse_matmul, reference, IMPLEMENTATIONS, CASES)
