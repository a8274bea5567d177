"""Grouped matmul: the rows of each group of x times a matrix of the group, as in an MoE layer.

y_t = x_t W_g, dx_t = dy_t W_g^T for the rows t of group g, and dW_g = x_g^T dy_g: 2 K N FLOPs a row
each, whatever the number of groups. Rows are sorted by group and groups are of any size, so no row
is dropped and none is computed for padding, except where a tile meets the end of a group. This is
`jax.lax.ragged_dot` with gradients as kernels of their own. Each implementation states how it cuts
groups into tiles, and its roofline.

Gale et al., MegaBlocks: Efficient sparse training with mixture-of-experts, 2022, arXiv:2211.15841,
computes the same as a block-sparse product whose blocks stand on the diagonal.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

from pallas_kernels import _grouped_matmul_xla as xla
from pallas_kernels._op import KernelOp, choose, sum_type, vary_alike


class Implementation(NamedTuple):
    """What an implementation is made of; x [T, K], dy [T, N], w [E, K, N] or its transpose.

    Attributes:
        matmul: (x, w, group_sizes, transpose_w) -> y.
        gradients: (x, dy, w, group_sizes, transpose_w) -> gradients of x and of w.
    """

    matmul: Any
    gradients: Any


def _tpu() -> Any:
    from pallas_kernels import _grouped_matmul_tpu  # late: Pallas takes 70 ms to import

    return _grouped_matmul_tpu


IMPLEMENTATIONS = {
    "xla": Implementation(xla.matmul, xla.gradients),
    "tpu": Implementation(lambda *a: _tpu().matmul(*a), lambda *a: _tpu().gradients(*a)),
    # "gpu", for Hopper, goes here; until then `choose` takes "xla" there.
}


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_w: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """The rows of each group of x times the matrix of the group, like `jax.lax.ragged_dot`.

    Row t belongs to group g if sum(group_sizes[:g]) <= t < sum(group_sizes[:g + 1]). Differentiable
    in x and w; a group without rows has a zero gradient. New sizes never recompile. What stands in
    rows of other groups, or past the sum, does not matter, not even if it is NaN.

    Args:
        x: `[T, K]`, sorted by group. Dtypes of x and w promote.
        w: `[E, K, N]`, or `[E, N, K]` with `transpose_w`.
        group_sizes: Integers `[E]`, 0 or more, whose sum is at most T.
        transpose_w: Multiply by the transposed matrices.
        implementation: "tpu" or "xla"; chosen by device if not given.

    Returns:
        `[T, N]`; sums are float32 or wider. Rows past the sum of the sizes are zero.

    Raises:
        ValueError: If shapes do not fit, if known sizes are negative or exceed T, or if there is no
            such implementation. Inside jit, `jax.experimental.checkify` checks the sizes.
        TypeError: If group_sizes are not integers.
        NotImplementedError: If the device cannot run `implementation`.

    Example:
        >>> from pallas_kernels import grouped_matmul
        >>> w = jnp.array([[[1.0]], [[10.0]], [[100.0]]])
        >>> grouped_matmul(jnp.ones((5, 1)), w, jnp.array([1, 0, 3]))[:, 0]
        Array([  1., 100., 100., 100.,   0.], dtype=float32)

    Cost: 2 T K N FLOPs and no memory beyond the result; see the head of the file of each
    implementation. Under differentiation x and w are kept. Under `jax.vmap` the slices run one
    after the other. Outside jit the check waits for group_sizes.

    References: Gale et al., MegaBlocks, 2022, arXiv:2211.15841.
    """
    choice = choose("grouped_matmul", IMPLEMENTATIONS, implementation)
    check(x, w, group_sizes, transpose_w)
    dtype = jnp.result_type(x, w)
    x, w = x.astype(dtype), w.astype(dtype)
    if not x.size or not w.size:
        return jnp.zeros((x.shape[0], w.shape[1 if transpose_w else 2]), dtype)
    if implementation is None:
        choice = fallback(choice, dtype, x.shape[0], *w.shape)
    x, w, group_sizes = vary_alike(x, w, group_sizes)
    y: jax.Array = product(choice, transpose_w, x, w, group_sizes)
    return y


def fallback(choice: str, dtype: Any, t: int, e: int, k: int, n: int) -> str:
    """`choice`, or "xla" if its kernels cannot take t rows and matrices [e, k, n]."""
    return "xla" if choice == "tpu" and _tpu().supports(dtype, t, e, k, n) else choice


def check(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose_w: bool = False) -> None:
    """Raise where shapes or sizes do not fit; see `grouped_matmul`."""
    want = "[E, N, K]" if transpose_w else "[E, K, N]"
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2 if transpose_w else 1]:
        raise ValueError(
            f"x must be [T, K] and w {want} of one K; got {x.shape} and {w.shape}. Flatten leading "
            "axes of x, or see transpose_w."
        )
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"group_sizes must have one size a matrix of w, shape {w.shape[:1]}; got "
            f"{group_sizes.shape}. Count rows by jnp.bincount(experts, length={w.shape[0]})."
        )
    check_group_sizes(group_sizes, x.shape[0])


def check_group_sizes(group_sizes: jax.Array, t: int) -> None:
    """Raise unless sizes are integers, none negative, with a sum of at most t.

    On the host; under `jax.experimental.checkify` also inside jit, and in plain jit only the dtype.
    """
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(
            f"group_sizes must be integers; got {group_sizes.dtype}. Convert them, e.g. "
            "group_sizes.astype(jnp.int32)."
        )
    if not group_sizes.size:
        return
    least, total = jnp.min(group_sizes), jnp.sum(group_sizes)
    if isinstance(least, Tracer) or isinstance(total, Tracer):
        checkify.debug_check(least >= 0, "a group has {least} rows", least=least)
        checkify.debug_check(total <= t, "groups have {total} rows, x has fewer", total=total)
        return
    if int(least) < 0:
        raise ValueError(
            f"group_sizes[{int(jnp.argmin(group_sizes))}] is {int(least)}; a group has 0 rows or "
            "more. Clip the sizes, or look for the overflow that made it."
        )
    if int(total) > t:
        raise ValueError(
            f"group_sizes have a sum of {int(total)}, and x has {t} rows; the sum may be less, but "
            "not more. Count the rows again, or pad x."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
    choice: str, transpose_w: bool, x: jax.Array, w: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """`grouped_matmul` by an implementation, of operands that fit."""
    return IMPLEMENTATIONS[choice].matmul(x, w, group_sizes, transpose_w)


def _forward(choice, transpose_w, x, w, group_sizes):
    return product(choice, transpose_w, x, w, group_sizes), (x, w, group_sizes)


def _backward(choice, transpose_w, saved, dy):
    x, w, group_sizes = saved
    return *IMPLEMENTATIONS[choice].gradients(x, dy, w, group_sizes, transpose_w), None


product.defvjp(_forward, _backward)


def reference(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, transpose_w: bool = False
) -> jax.Array:
    """The same as one dense product a group, whose rows are then chosen, in float32."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    own = (rows >= ends - group_sizes) & (rows < ends)  # [T, E]
    spec = "tk,enk->etn" if transpose_w else "tk,ekn->etn"
    dtype, wide = jnp.result_type(x, w), sum_type(jnp.result_type(x, w))
    y = jnp.einsum(spec, x.astype(wide), w.astype(wide), precision="highest")
    return jnp.where(own.T[..., None], y, 0).sum(0).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape that every implementation must handle.

    Attributes:
        name: What is special about it.
        k: Columns of x.
        n: Columns of the result.
        sizes: Rows of each group.
        past: Rows of x past the sum.
        dtype: Of x and w.
        tolerance: Largest error over the largest entry of the reference.
    """

    name: str
    k: int
    n: int
    sizes: tuple[int, ...]
    past: int = 0
    dtype: str = "float32"
    tolerance: float = 1e-5

    @property
    def t(self) -> int:
        """Rows of x."""
        return sum(self.sizes) + self.past


CASES = (
    Case("even groups", 128, 256, (64, 64, 64, 64)),
    Case("uneven, empty groups, rows past the sum", 256, 128, (37, 0, 130, 1, 64, 68), 12),
    Case("one group has all rows", 128, 128, (0, 0, 300, 0)),
    Case("no group has rows", 128, 128, (0, 0, 0), 40),
    Case("one row", 128, 128, (0, 1)),
    Case("one matrix", 128, 256, (70,), 3),
    Case("many small groups", 128, 128, (*range(12), 3, 0, 5, 1, 0, 0, 9, 2)),
    Case("ragged columns", 130, 70, (20, 33, 5), 2),
    Case("bf16", 256, 256, (100, 30, 0, 126), 0, "bfloat16", 1e-2),
    Case("bf16, rows past the sum", 128, 384, (5, 90, 16, 16), 30, "bfloat16", 1e-2),
)

OP = KernelOp("grouped_matmul", grouped_matmul, reference, IMPLEMENTATIONS, CASES)
