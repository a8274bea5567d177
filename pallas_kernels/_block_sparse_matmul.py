"""x @ W for a weight stored as blocks: forward, dX and dW at the stored blocks only.

y = x W, dx = dy W^T, dW_s = x[:, row(s)]^T dy[:, col(s)] for each stored block s: 2 M bk bn FLOPs a
block each, so with density d the floor is d times the dense products. Sums are float32; a bias and
an activation meet them before they are rounded. Layouts and orders: `_topology.py`; each
implementation states its own roofline.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels import _block_sparse_matmul_xla as xla
from pallas_kernels._op import KernelOp, choose, finish, sum_type, vary_alike
from pallas_kernels._topology import Topology, check_topology


class Implementation(NamedTuple):
    """What an implementation is made of; x [M, K], dy [M, N], values [S, bk, bn].

    Attributes:
        matmul: (x, values, topology, transpose, *, bias=None, activation=None) -> x @ W, or
            x @ W^T; the last two are applied to the sums.
        gradients: (x, dy, values, topology) -> gradients of x and of the values for y = x @ W.
    """

    matmul: Any
    gradients: Any


def _tpu() -> Any:
    from pallas_kernels import _block_sparse_matmul_tpu  # late: Pallas takes 70 ms to import

    return _block_sparse_matmul_tpu


def _gpu() -> Any:
    from pallas_kernels import _block_sparse_matmul_gpu  # late: Mosaic GPU needs absl-py

    return _block_sparse_matmul_gpu


IMPLEMENTATIONS = {
    "xla": Implementation(xla.matmul, xla.gradients),
    "tpu": Implementation(lambda *a, **k: _tpu().matmul(*a, **k), lambda *a: _tpu().gradients(*a)),
    "gpu": Implementation(lambda *a, **k: _gpu().matmul(*a, **k), lambda *a: _gpu().gradients(*a)),
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
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    transpose: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """activation(x @ W + bias), or with x @ W^T, for a weight W [K, N] stored as blocks.

    Differentiable in x, values and bias; the gradient of values is computed at the slots in use and
    is zero in the others, whose values are never read. A new topology of the same number of slots
    never recompiles.

    Args:
        x: `[..., K]`, or `[..., N]` with `transpose`; any number of rows.
        values: `[S, bk, bn]`. Dtypes promote, but floats of 8 bits are storage only: their blocks
            are converted to the dtype of x as they are used, and their gradient is rounded to 8
            bits (so train a wider copy, and convert it).
        topology: From `plan`, for S slots; no two slots in use may stand at one place.
        bias: `[N]`, or `[K]` with `transpose`.
        activation: A function of entries, such as `jax.nn.silu`, without parameters of its own. It
            is static: give the same function each time, not a new lambda, or jit compiles again.
        transpose: Multiply by W^T.
        implementation: "tpu", "gpu" or "xla"; chosen by device if not given.

    Returns:
        `[..., N]`, or `[..., K]` with `transpose`; sums are float32 or wider, and are rounded after
        bias and activation.

    Raises:
        ValueError: If shapes do not fit, or there is no such implementation.
        TypeError: If 8-bit values meet an x that is not a wider float.
        NotImplementedError: If the device cannot run `implementation`.

    Example:
        >>> from pallas_kernels import block_sparse_matmul, plan
        >>> topology = plan(jnp.array([1]), jnp.array([0]), (2, 2))
        >>> block_sparse_matmul(jnp.arange(4.0)[None], jnp.ones((1, 2, 2)), topology)
        Array([[5., 5., 0., 0.]], dtype=float32)

    Cost: see the head of the file of each implementation. Under differentiation x and, for an
    activation, z = x @ W + bias of the dtype of the result are kept; the activation then meets z
    rounded to it.
    """
    choice = choose("block_sparse_matmul", IMPLEMENTATIONS, implementation)
    check(x, values, topology, transpose)
    dtype = product_type(x, values)
    if implementation is None:
        choice = fallback(choice, dtype, values)
    size = topology.grid[0] * values.shape[1] if transpose else topology.grid[1] * values.shape[2]
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"bias must have one entry an output, shape ({size},); got {bias.shape}.")
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if not values.shape[0] or not rows.size:
        y = finish(jnp.zeros((rows.shape[0], size), sum_type(dtype)), bias, activation)
        return y.astype(dtype).reshape(*x.shape[:-1], size)
    if implementation is None:
        choice = fitting(choice, rows.shape[0], values, dtype, topology)
    values = stored_for(choice, values, dtype)
    rows, values, _, *biases = vary_alike(
        rows, values, topology.rows, *([] if bias is None else [bias])
    )
    y: jax.Array = _matmul(
        choice, transpose, rows, values, topology, biases[0] if biases else None, activation
    )
    return y.reshape(*x.shape[:-1], size)


def product_type(x: jax.Array, values: jax.Array) -> Any:
    """The dtype of operands and result: promoted, or that of x if values have 8 bits.

    Raises:
        TypeError: If x is then not a wider float.
    """
    if not _is_small(values.dtype):
        return jnp.result_type(x, values)
    if not jnp.issubdtype(x.dtype, jnp.floating) or _is_small(x.dtype):
        raise TypeError(
            f"values of {values.dtype} are multiplied in the dtype of x, which must be a float of "
            f"16 bits or more; got {x.dtype}. Convert x, e.g. x.astype(jnp.bfloat16)."
        )
    return x.dtype


def _is_small(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


def stored_for(choice: str, values: jax.Array, dtype: Any) -> jax.Array:
    """Values as an implementation takes them: of 8 bits where it converts blocks itself."""
    return values if _is_small(values.dtype) and choice != "gpu" else values.astype(dtype)


def fallback(choice: str, dtype: Any, *weights: jax.Array) -> str:
    """`choice`, or "xla" if its kernels cannot take the values."""
    if choice == "xla":
        return choice
    for values in weights:
        block = values.shape[1:]
        stored = stored_for(choice, values, dtype).dtype
        if choice == "tpu" and _tpu().supports(dtype, *block, stored):
            return "xla"
        if choice == "gpu" and _gpu().supports(dtype, *block):
            return "xla"
    return choice


def fitting(choice: str, m: int, values: jax.Array, dtype: Any, *topologies: Topology) -> str:
    """`choice`, or "xla", with a warning, if a product of m rows does not fit the device.

    Two topologies are those of a gated product.
    """
    if choice != "tpu":
        return choice
    from pallas_kernels._block_sparse_tpu import too_large  # late, as above

    reason = too_large(m, topologies[0], values.shape[1:], dtype, *topologies[1:])
    if not reason:
        return choice
    warnings.warn(f"implementation='xla' is taken here, for {reason}", stacklevel=3)
    return "xla"


def check(x: jax.Array, values: jax.Array, topology: Topology, transpose: bool = False) -> None:
    """Raise ValueError where shapes do not fit; under checkify also look at the topology."""
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
    if isinstance(topology.rows, Tracer):
        check_topology(topology)  # for checkify; else no work


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def _matmul(
    choice: str,
    transpose: bool,
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    return IMPLEMENTATIONS[choice].matmul(
        x, values, topology, transpose, bias=bias, activation=activation
    )


def _matmul_forward(choice, transpose, x, values, topology, bias, activation):
    z: jax.Array = _matmul(choice, transpose, x, values, topology, bias)
    if activation is None:
        return z, (x, values, topology, bias, None)
    y = activation(z.astype(sum_type(z.dtype))).astype(z.dtype)
    return y, (x, values, topology, bias, z)


def _matmul_backward(choice, transpose, activation, saved, dy):
    x, values, topology, bias, z = saved
    wide = sum_type(dy.dtype)
    if z is not None:
        pull = jax.vjp(activation, z.astype(wide))[1]
        dy = pull(dy.astype(wide))[0].astype(dy.dtype)
    dbias = None if bias is None else dy.sum(0, dtype=wide).astype(bias.dtype)
    if not transpose:
        return *IMPLEMENTATIONS[choice].gradients(x, dy, values, topology), None, dbias
    # y = x W^T: W plays the same part with the roles of x and dy exchanged.
    dx = IMPLEMENTATIONS[choice].matmul(dy, values, topology, False)
    return dx, IMPLEMENTATIONS[choice].gradients(dy, x, values, topology)[1], None, dbias


_matmul.defvjp(_matmul_forward, _matmul_backward)


def reference(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    transpose: bool = False,
) -> jax.Array:
    """The same through the dense weight, in float32 at the highest precision."""
    w = todense(values.astype(jnp.float32), topology)
    y = jnp.matmul(x.astype(jnp.float32), w.T if transpose else w, precision="highest")
    return finish(y, bias, activation).astype(product_type(x, values))


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
