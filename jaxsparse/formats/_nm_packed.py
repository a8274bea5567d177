"""N:M weights packed: `n` values of every group of `m`, and their places in the group.

Layout along the packed axis, whose length is `blocks * m * stride`: the members of a group stand
`stride` apart, so row `(b * m + i) * stride + j` is member i of group (b, j). Stored is, in the
same order, row `(b * n + s) * stride + j`: the s-th kept member of group (b, j). Slot s of a block
is a slab of `stride` rows, and the weight comes back as `n` selects between whole slabs, with no
gather: `slab[i] = where(places == i, values, slab[i])`.

* `stride=1`: m consecutive members, the 2:4 of GPUs and of `NM`. Slabs are single rows, so on a TPU
  members have to move between sublanes (lanes for axis -1).
* `stride=128`: slabs are whole TPU registers (a multiple of 128 lanes, and of 8, 16 or 32 sublanes
  for values of 4, 2 or 1 bytes), so members stay in their lanes and sublanes. Not measured there.

Places take 1, 2, 4 or 8 bits for m up to 2, 4, 16 or 256; a byte row holds p slabs in a row,
the first one in its lowest bits. p is 8 / bits, or less where that does not divide the `blocks * n`
slabs: `p = gcd(blocks * n, 8 / bits)`. Rank is that of the dense weight, so a PartitionSpec still
applies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxsparse import _tree
from jaxsparse.formats._protocol import multiply_slices, whole_mask
from jaxsparse.patterns import NM, make_mask


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "indices"],
    meta_fields=["n", "m", "axis", "stride"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class NMPacked:
    """A weight `[..., K, N]` that keeps n of every m entries, in n/m of the memory.

    Made by `from_dense`. `x @ w` is exact; its gradient with respect to `values` is the dense one
    at the stored places. Only `values` can be trained, and `indices` are integers, so write
    `jax.grad(lambda v: loss(x @ dataclasses.replace(w, values=v)))(w.values)`.

    Attributes:
        values: `[..., K * n / m, N]`, the kept entries; `[..., K, N * n / m]` for axis -1.
        indices: uint8, the places of the values in their groups, up to 8 in a byte: of the shape of
            `values` with the packed axis up to 8 times shorter.
        n: Entries kept in each group.
        m: Size of a group.
        axis: Axis along which groups lie, -2 (inputs) or -1 (outputs).
        stride: Distance between the members of a group.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.formats import NMPacked
        >>> w = NMPacked.from_dense(jnp.array([[1.0], [-5.0], [3.0], [4.0]]), 2, 4)
        >>> w.values[:, 0], jnp.ones(4) @ w, w.density
        (Array([-5., 4.], dtype=float32), Array([-1.], dtype=float32), 0.5)

    Cost: 2:4 takes 9/16 of the dense bytes in bfloat16, 17/32 in float32. A product unpacks the
    weight, n selects an entry, and multiplies densely: for the time of a product the dense weight
    is there too, and it is slower than dense (on a CPU, float32: one row 5 times at 2048 x 2048, 15
    times at 4096 x 4096; 64 rows 1.6 times). What it saves is memory, where many weights are at
    rest. The backward pass unpacks again, so that no dense weight waits for it.

    References: Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, arXiv:2104.08378.
    """

    values: jax.Array
    indices: jax.Array
    n: int
    m: int
    axis: int = -2
    stride: int = 1

    __array_ufunc__ = None  # numpy arrays on the left leave `@` to us

    @classmethod
    def from_dense(
        cls, w: Any, n: int, m: int, *, mask: Any = None, axis: int = -2, stride: int = 1
    ) -> NMPacked:
        """Pack a weight; differentiable in `w`, under jit or not.

        Args:
            w: `[..., K, N]`.
            n: Entries kept in each group.
            m: Size of a group, at most 256.
            mask: bool, broadcastable to `w`, True = kept, at most n in every group. A group with
                fewer is filled up with zeros at its first other places, and these can be trained.
                Without a mask the n largest |w| are kept, ties by index; NaN counts as absent.
            axis: Axis along which groups lie, -2 (inputs) or -1 (outputs).
            stride: Distance between the members of a group: 1, so that groups are those of
                `NM(n, m, axis)`, or 128, which suits the registers of a TPU.

        Raises:
            ValueError: If the shape does not fit, or a group of the mask keeps more than n. A
                traced mask cannot be checked: then the first n of such a group are kept.
            TypeError: If the mask is not bool.

        Example:
            >>> import jax.numpy as jnp
            >>> from jaxsparse.formats import NMPacked
            >>> NMPacked.from_dense(jnp.arange(8.0)[:, None], 1, 4, stride=2).todense()[:, 0]
            Array([0., 0., 0., 0., 0., 0., 6., 7.], dtype=float32)

        Cost: two masks, and n reductions over `w`.
        """
        w = jnp.asarray(w)
        pattern = NM(n, m, axis)
        _check_shape(w.shape, pattern, stride)
        with jax.ensure_compile_time_eval():  # a mask that jit does not trace is known under it too
            masks = () if mask is None else (_checked_mask(mask, w.shape, pattern, stride),)
        values, indices = _pack(pattern, stride, w, *masks)
        return cls(values, indices, n, m, axis, stride)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N), inputs and outputs of one slice."""
        *_, k, n = self.values.shape
        return (k // self.n * self.m, n) if self.axis == -2 else (k, n // self.n * self.m)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def density(self) -> float:
        """Share of entries stored, n / m."""
        return self.n / self.m

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices, all slices."""
        return self.values.nbytes + self.indices.nbytes

    @property
    def T(self) -> NMPacked:
        """The transpose of each slice, `[..., N, K]`, with the groups along the other axis."""
        values, indices = self.values.swapaxes(-1, -2), self.indices.swapaxes(-1, -2)
        return dataclasses.replace(self, values=values, indices=indices, axis=-3 - self.axis)

    def todense(self) -> jax.Array:
        """The weight with its zeros, `[..., K, N]`. Cost: n selects an entry."""
        return _unpack(self)

    def __rmatmul__(self, x: Any) -> jax.Array:
        return multiply_slices(_multiply, self, x, self.values.shape[:-2])


def _check_shape(shape: tuple[int, ...], pattern: NM, stride: int) -> None:
    name = f"NMPacked({pattern.n}, {pattern.m}, stride={stride})"
    if pattern.m > 256:
        raise ValueError(f"NMPacked stores places in a byte, so m <= 256; got m={pattern.m}.")
    if stride < 1:
        raise ValueError(f"NMPacked(stride=) is a distance, 1 or more; got {stride}.")
    if len(shape) < 2:
        raise ValueError(f"{name} needs a weight of at least 2 axes, [..., K, N]; got {shape}.")
    if shape[pattern.axis] % (pattern.m * stride):
        raise ValueError(
            f"{name} needs axis {pattern.axis} to be a multiple of m * stride = "
            f"{pattern.m * stride}; got {shape}. Pad it, choose axis={-3 - pattern.axis}"
            + (", or a smaller stride." if stride > 1 else ".")
        )


def _checked_mask(mask: Any, shape: tuple[int, ...], pattern: NM, stride: int) -> jax.Array:
    """The mask in the shape of the weight; errors if it is no bool or keeps too much."""
    mask = whole_mask(mask, shape)
    if not isinstance(mask, Tracer) and mask.size:
        most = int(_most_kept(pattern, stride, mask))
        if most > pattern.n:
            apart = "consecutive" if stride == 1 else f"each {stride} apart"
            raise ValueError(
                f"NMPacked({pattern.n}, {pattern.m}) keeps at most {pattern.n} of every "
                f"{pattern.m} entries along axis {pattern.axis}, {apart}; the mask keeps {most} of "
                f"a group. Make it with {pattern} and stride=1, or leave mask out."
            )
    return mask


@functools.partial(jax.jit, static_argnums=(0, 1))
def _most_kept(pattern: NM, stride: int, mask: jax.Array) -> jax.Array:
    """Entries that the fullest group keeps."""

    def count(mask: jax.Array) -> jax.Array:
        at = mask.ndim + pattern.axis
        groups = _split(mask, at, mask.shape[at] // (pattern.m * stride), pattern.m, stride)
        return jnp.max(jnp.sum(groups, at + 1, dtype=jnp.int32))

    return _tree.in_auto_mode(count, mask, replicated=True)


def _bits(m: int) -> int:
    """Bits of a place: the least of 1, 2, 4, 8 that can count to m."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def _split(x: jax.Array, at: int, *sizes: int) -> jax.Array:
    """Axis `at` as several axes."""
    return x.reshape(*x.shape[:at], *sizes, *x.shape[at + 1 :])


def _join(x: jax.Array, at: int) -> jax.Array:
    """The three axes from `at` as one."""
    return x.reshape(*x.shape[:at], math.prod(x.shape[at : at + 3]), *x.shape[at + 3 :])


def _along(count: int, at: int, ndim: int) -> jax.Array:
    """uint8 0 to count - 1 along axis `at` of `ndim` axes."""
    return lax.broadcasted_iota(jnp.uint8, [count if i == at else 1 for i in range(ndim)], at)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pack(
    pattern: NM, stride: int, w: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Values and indices; where there is no mask, of the largest |w|."""
    masks = () if mask is None else (mask,)
    return _tree.in_auto_mode(functools.partial(_pack_slabs, pattern, stride), w, *masks)


def _pack_slabs(
    pattern: NM, stride: int, w: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    n, m, at = pattern.n, pattern.m, w.ndim + pattern.axis
    blocks = w.shape[at] // (m * stride)

    def choose(scores: jax.Array) -> jax.Array:
        """The mask of n in each group of `[..., blocks, m, stride, ...]`."""
        consecutive = jnp.moveaxis(scores, at + 1, at + 2)
        return jnp.moveaxis(make_mask(pattern, consecutive, n / m), at + 2, at + 1)

    sizes = (blocks, m, stride)
    w = _split(w, at, *sizes)
    if mask is None:
        kept = choose(lax.stop_gradient(jnp.abs(w)))
    else:
        kept = _split(mask, at, *sizes)
    w = jnp.where(kept, w, jnp.zeros((), w.dtype))
    stored = choose(kept.astype(jnp.int8))  # fills a group that keeps fewer, from its first place
    slot = jnp.cumsum(stored, at + 1, dtype=jnp.int32) - 1
    place = _along(m, at + 1, w.ndim)
    values, places = [], []
    for s in range(n):
        here = stored & (slot == s)
        values.append(jnp.sum(jnp.where(here, w, jnp.zeros((), w.dtype)), at + 1, dtype=w.dtype))
        places.append(jnp.sum(jnp.where(here, place, jnp.uint8(0)), at + 1, dtype=jnp.uint8))
    return _join(jnp.stack(values, at + 1), at), _pack_places(jnp.stack(places, at + 1), at, m)


def _pack_places(places: jax.Array, at: int, m: int) -> jax.Array:
    """`[..., blocks, n, stride, ...]` uint8 to bytes that hold several of them."""
    blocks, n, stride = places.shape[at : at + 3]
    in_byte = math.gcd(blocks * n, 8 // _bits(m))
    slabs = _join(places, at)
    slabs = _split(slabs, at, blocks * n // in_byte, in_byte, stride)
    shifted = slabs << (_along(in_byte, at + 1, slabs.ndim) * jnp.uint8(_bits(m)))
    return _join(jnp.sum(shifted, at + 1, keepdims=True, dtype=jnp.uint8), at)


@jax.jit
def _multiply(w: NMPacked, x: jax.Array) -> jax.Array:
    # The backward pass unpacks again instead of keeping a dense weight.
    return jax.checkpoint(lambda w, x: jnp.matmul(x, _unpack(w)))(w, x)


@jax.jit
def _unpack(w: NMPacked) -> jax.Array:
    return _tree.in_auto_mode(functools.partial(_unpack_slabs, w), w.values, w.indices)


def _unpack_slabs(packed: NMPacked, values: jax.Array, indices: jax.Array) -> jax.Array:
    n, m, stride = packed.n, packed.m, packed.stride
    at, bits = values.ndim + packed.axis, _bits(m)
    slabs = values.shape[at] // stride
    in_byte = values.shape[at] // max(indices.shape[at], 1)
    places = _split(indices, at, indices.shape[at] // stride, 1, stride)
    places = places >> (_along(in_byte, at + 1, places.ndim) * jnp.uint8(bits))
    places = _join(places & jnp.uint8(2**bits - 1), at)
    places = _split(places, at, slabs // n, n, stride)
    values = _split(values, at, slabs // n, n, stride)
    member = _along(m, at + 1, values.ndim)
    dense = jnp.zeros((), values.dtype)
    for s in range(n):
        here = lax.index_in_dim(places, s, at + 1) == member
        dense = jnp.where(here, lax.index_in_dim(values, s, at + 1), dense)
    return _join(dense, at)
