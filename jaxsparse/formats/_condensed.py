"""Weights with few inputs for every output, for inference: Lasby et al., 2023, arXiv:2305.02299.

With k inputs kept for every output a weight is two matrices: which inputs, and their values. For
output n, y_n = sum_j values[j, n] x[indices[j, n]]; outputs without inputs (ablated by SRigL) are
left out. Stored as [k, N], the transpose of the paper's: a turn takes one input of every output,
and for several rows x is gathered in rows of x^T, which are contiguous. In the order [N, k] XLA
takes about as long for one row, and for 64 rows two to three times as long.

Time of dense over time of Condensed, float32, XLA on two cores with 32 MB of cache, which others
shared: medians of three runs of `experiments/bench_formats.py`, single ones of which differ by up
to twice.

    weight       batch   90 %   95 %   99 %
    2048 x 2048      1    1.4    2.0    4.0
    2048 x 2048      8    1.4    2.4    6.0
    4096 x 4096      1    2.1    5.4    9.3
    4096 x 4096      8    2.5    3.3   10.1

CSR, for weights without that structure, takes 0.2 to 0.8 of the dense speed at 90 % there.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxsparse.formats._protocol import multiply_slices, whole_mask
from pallas_kernels._op import sum_type


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "indices", "outputs"],
    meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Condensed:
    """A weight `[..., K, N]` of constant fan-in: of every output its k inputs and their values.

    Made by `from_dense`, from a mask of `srigl` or of the pattern `FanIn`. Differentiable in x and
    `values`; sums are float32 at least.

    Attributes:
        values: `[..., k, A]`, the j-th kept value of each of A outputs, by row; zero for none.
        indices: `[..., k, A]`, its row; K where there is none. uint16, or int32 if K > 65535.
        outputs: int32 `[..., A]`, which outputs these are, ascending; N where there is none.
        shape: (K, N) of one slice.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> w = jsp.Condensed.from_dense(jnp.array([[0.0, 0.0, 2.0], [3.0, 0.0, 0.0]]))
        >>> jnp.array([1.0, 10.0]) @ w, w.values.tolist(), w.outputs.tolist()
        (Array([30.,  0.,  2.], dtype=float32), [[3.0, 2.0]], [0, 2])

    Cost: a value and 2 bytes of index for each input of an output. 2 k A FLOPs a row. Where an
    output has fewer than k inputs its places are filled up, so one dense output makes all of them
    dense. For inference: nothing here is sharded.

    References: Lasby et al., Dynamic Sparse Training with Structured Sparsity, 2023,
        arXiv:2305.02299.
    """

    values: jax.Array
    indices: jax.Array
    outputs: jax.Array
    shape: tuple[int, int]

    __array_ufunc__ = None  # numpy_array @ w calls __rmatmul__

    @classmethod
    def from_dense(cls, w: Any, mask: Any = None, fan_in: int | None = None) -> Condensed:
        """Store the kept inputs of every output; differentiable in `w`.

        Args:
            w: `[..., K, N]`.
            mask: bool, broadcastable to `w`, True = kept. What is not zero if not given.
            fan_in: Most inputs of an output, k. As many as are needed if not given, which must be
                known, so where the mask is traced it is required, and there are places for all
                outputs. More inputs raise; where that cannot be known, the last ones are left out.

        Returns:
            The weight.

        Raises:
            ValueError: If shapes do not fit, or an output keeps more than `fan_in`.
            TypeError: If the mask is not bool, or is traced and `fan_in` is not given.

        Example:
            >>> import jax.numpy as jnp, jaxsparse as jsp
            >>> mask = jsp.make_mask(jsp.FanIn(), jnp.arange(8.0).reshape(4, 2), 0.5)
            >>> jsp.Condensed.from_dense(jnp.ones((4, 2)), mask).indices.tolist()
            [[2, 2], [3, 3]]

        Cost: two sorts of the mask.
        """
        with jax.ensure_compile_time_eval():  # a mask that jit does not trace is known under it too
            w = jnp.asarray(w)
            keep = _kept(w, mask)
            known = not isinstance(keep, Tracer)
            held = jnp.sum(keep, -2, dtype=jnp.int32)
            most = int(jnp.max(held, initial=0)) if known else 0
            stored = int(jnp.max(jnp.sum(held > 0, -1), initial=0)) if known else w.shape[-1]
        if fan_in is None and not known:
            raise TypeError(
                "Condensed.from_dense must know how many inputs an output keeps, and this mask is "
                "traced. Give fan_in=, or make the weight outside of jit."
            )
        fan_in = most if fan_in is None else fan_in
        if most > fan_in:
            raise ValueError(
                f"Condensed with fan_in={fan_in} keeps at most so many inputs of an output; the "
                f"mask keeps {most}. Give a larger one, or make the mask with FanIn()."
            )
        k, n = w.shape[-2:]
        values, indices, outputs = _pack(min(fan_in, k), stored, w, keep)
        return cls(values, indices, outputs, (k, n))

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def density(self) -> jax.Array:
        """Entries stored over all entries, float32 `[...]`."""
        held = (self.indices < self.shape[0]) & (self.outputs < self.shape[1])[..., None, :]
        return jnp.sum(held, (-2, -1), dtype=jnp.float32) / max(math.prod(self.shape), 1)

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and outputs, all slices."""
        return self.values.nbytes + self.indices.nbytes + self.outputs.nbytes

    def todense(self) -> jax.Array:
        """The weight with its zeros, `[..., K, N]`. Cost: one scatter."""

        def scatter(w: Condensed) -> jax.Array:
            zeros = jnp.zeros(w.shape, w.dtype)
            return zeros.at[w.indices, w.outputs].add(w.values, mode="drop")

        for _ in self.values.shape[:-2]:
            scatter = jax.vmap(scatter)
        return scatter(self)

    def __rmatmul__(self, x: Any) -> jax.Array:
        return multiply_slices(_multiply, self, x, self.values.shape[:-2])


def _kept(w: jax.Array, mask: Any) -> jax.Array:
    """The mask in the shape of the weight; errors if one of them does not fit."""
    if w.ndim < 2:
        raise ValueError(f"Condensed needs a weight [..., K, N]; got {w.shape}.")
    return w != 0 if mask is None else whole_mask(mask, w.shape)


@partial(jax.jit, static_argnums=(0, 1))
def _pack(
    fan_in: int, stored: int, w: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, indices and outputs of the first `fan_in` inputs of the first `stored` outputs."""
    k, n = w.shape[-2:]
    some = jnp.any(keep, -2)
    at = jnp.argsort(~some, axis=-1, stable=True)[..., :stored]
    outputs = jnp.where(jnp.take_along_axis(some, at, -1), at, n).astype(jnp.int32)
    w, keep = (jnp.take_along_axis(a, at[..., None, :], -1) for a in (w, keep))
    rows = jnp.argsort(~keep, axis=-2, stable=True)[..., :fan_in, :]
    held = jnp.take_along_axis(keep, rows, -2)
    values = jnp.where(held, jnp.take_along_axis(w, rows, -2), jnp.zeros((), w.dtype))
    kind = jnp.uint16 if k <= 65535 else jnp.int32
    return values, jnp.where(held, rows, k).astype(kind), outputs


@jax.jit
def _multiply(w: Condensed, x: jax.Array) -> jax.Array:
    """`[..., K]` to `[..., N]`, one slice."""
    out_type = jnp.result_type(x, w.values)
    if not w.values.size:
        return jnp.zeros((*x.shape[:-1], w.shape[1]), out_type)
    wide = sum_type(out_type)
    rows = x.reshape(math.prod(x.shape[:-1]), w.shape[0])
    y = _product(rows.T.astype(wide), w.values.astype(wide), w.indices)
    y = jnp.zeros((w.shape[1], rows.shape[0]), wide).at[w.outputs].set(y, mode="drop")
    return y.T.reshape(*x.shape[:-1], w.shape[1]).astype(out_type)


@jax.custom_vjp
def _product(x: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
    """Y [A, B] from x [K, B], values and indices [k, A]: one turn for each of the k inputs."""
    x = _with_none(x)
    if x.shape[1] == 1:
        terms = x[:, 0].at[indices].get(mode="promise_in_bounds") * values
        return jnp.sum(terms, 0)[:, None]

    def turn(j: jax.Array, y: jax.Array) -> jax.Array:
        return y + x.at[indices[j]].get(mode="promise_in_bounds") * values[j][:, None]

    start = jnp.zeros((values.shape[1], x.shape[1]), x.dtype)
    return lax.fori_loop(0, values.shape[0], turn, start, unroll=4)


def _forward(x: jax.Array, values: jax.Array, indices: jax.Array) -> tuple[jax.Array, tuple]:
    return _product(x, values, indices), (x, values, indices)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array) -> tuple:
    x, values, indices = saved
    full = _with_none(x)

    def turn(j: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx, dvalues = grads
        of_value = jnp.sum(full.at[indices[j]].get(mode="promise_in_bounds") * dy, 1)
        dx = dx.at[indices[j]].add(dy * values[j][:, None], mode="drop")
        return dx, dvalues.at[j].set(of_value)

    start = jnp.zeros_like(x), jnp.zeros_like(values)
    return *lax.fori_loop(0, values.shape[0], turn, start), None


_product.defvjp(_forward, _backward)


def _with_none(x: jax.Array) -> jax.Array:
    """Row K, to which indices of no input point, is zero."""
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])
