"""Unstructured sparse weights for inference on a CPU.

`x @ w` sums over each column of w, so stored is the CSR form of w^T: the kept entries of column 0,
then those of column 1, and so on. Each column is filled up to a multiple of 8 entries (row-grouped
CSR): for one row x, XLA then sums 8 neighbours at once and adds only their sum to an output.

Time of dense over time of CSR, float32, XLA on two cores with 32 MB of cache, which others shared:
medians of three runs of `experiments/bench_formats.py`, which differ by a fifth, and where CSR
takes about as long as dense by up to four times.

    weight       batch   90 %   95 %   99 %
    2048 x 2048      1    0.7    1.2    3.2
    2048 x 2048      8    0.4    0.7    2.9
    4096 x 4096      1    0.6    1.4    5.0
    4096 x 4096      8    0.2    0.8    4.0

So it pays for one row from about 95 % zeros on, for a few rows from somewhere between 95 and 99 %,
for many rows hardly ever; on a TPU or GPU it is for correctness only. In float32 it takes less
memory than dense from about a third of zeros on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxsparse.formats._protocol import multiply_slices, whole_mask

GROUP = 8  # entries in a row of `values`, all of one column


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "indices", "columns"],
    meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class CSR:
    """A weight `[..., K, N]` with zeros anywhere, of which only the other entries are stored.

    Made by `from_dense`. Differentiable in x and `values`; sums are float32 at least. Places that
    hold no entry stay zero, as their gradient is zero.

    Attributes:
        values: `[..., G, 8]`, G groups of entries, each of one column, in order of (column, row).
        indices: `[..., G, 8]`, the row of each entry; K where there is none.
        columns: `[..., G]`, the column of each group; N where the group is not in use. Indices and
            columns are uint16, or int32 if K or N exceeds 65535.
        shape: (K, N) of one slice.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.formats import CSR
        >>> w = CSR.from_dense(jnp.array([[0.0, 2.0], [3.0, 4.0], [0.0, 0.0]]))
        >>> jnp.array([1.0, 10.0, 100.0]) @ w, w.count.tolist(), w.columns.tolist()
        (Array([30., 42.], dtype=float32), 3, [0, 1])

    Cost: a value and 2 bytes of index an entry, and 4 places a column that are filled up on
    average. Faster than dense on a CPU, for one row from 95 % zeros on, for 8 rows near 99 %.
    For several rows a product takes temporary memory for rows * entries numbers. On one device:
    nothing here is sharded.

    References: Oberhuber, Suzuki and Vacata, New Row-grouped CSR format for storing the sparse
        matrices on GPU, 2010, arXiv:1012.2270.
    """

    values: jax.Array
    indices: jax.Array
    columns: jax.Array
    shape: tuple[int, int]

    __array_ufunc__ = None  # numpy_array @ w calls __rmatmul__

    @classmethod
    def from_dense(cls, w: Any, mask: Any = None, capacity: int | None = None) -> CSR:
        """Store the kept entries of a dense weight; differentiable in `w`.

        Args:
            w: `[..., K, N]`.
            mask: bool, broadcastable to `w`, True = kept. What is not zero if not given.
            capacity: Most entries that a slice can keep; as many as the fullest slice keeps if not
                given, which must be known, so where the mask is traced it is required. Entries
                beyond the capacity raise; where that cannot be known, the last ones by column and
                row are left out.

        Raises:
            ValueError: If shapes do not fit, or a slice keeps more than `capacity`.
            TypeError: If the mask is not bool, or it is traced and there is no capacity.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from jaxsparse.formats import CSR
            >>> store = jax.jit(lambda w: CSR.from_dense(w, capacity=3))
            >>> store(jnp.eye(2)).todense()[0]
            Array([1., 0.], dtype=float32)

        Cost: two scatters of K * N entries a slice.
        """
        with jax.ensure_compile_time_eval():  # a mask that jit does not trace is known under it too
            w = jnp.asarray(w)
            keep = _kept(w, mask)
            needs = None if isinstance(keep, Tracer) else _needs(keep)
        k, n = w.shape[-2:]
        limit = k * n if capacity is None else capacity
        if limit < 0:
            raise ValueError(f"CSR(capacity=) is a number of entries, 0 or more; got {capacity}.")
        if needs is not None:
            most, groups = map(int, needs)
            if most > limit:
                raise ValueError(
                    f"CSR with capacity={capacity} keeps at most so many entries of a slice; the "
                    f"mask keeps {most} of {(k, n)}. Raise the capacity, or prune more."
                )
        if capacity is not None:  # enough for any mask: at most 7 places a column in use are empty
            groups = (capacity + (GROUP - 1) * min(n, capacity)) // GROUP
            groups = min(groups, n * -(-k // GROUP))
        elif needs is None:
            raise TypeError(
                "CSR.from_dense must know how many entries are kept, and this mask is traced. "
                "Give capacity=, the most that a slice can keep, or make it outside of jit."
            )
        values, indices, columns = _store(groups, limit, w, keep)
        return cls(values, indices, columns, (k, n))

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def count(self) -> jax.Array:
        """int32 `[...]`: how many entries are stored."""
        return jnp.sum(self.indices < self.shape[0], (-2, -1), dtype=jnp.int32)

    @property
    def density(self) -> jax.Array:
        """Entries stored over all entries, float32 `[...]`."""
        return self.count / max(self.shape[0] * self.shape[1], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and columns, all slices."""
        return self.values.nbytes + self.indices.nbytes + self.columns.nbytes

    @property
    def T(self) -> CSR:
        """There is none: a transpose would need another order of the entries."""
        raise AttributeError(
            "CSR stores columns and has no transpose; write CSR.from_dense(w.todense().mT), which "
            "stores the other order."
        )

    def todense(self) -> jax.Array:
        """The weight with its zeros, `[..., K, N]`. Cost: one scatter."""
        return _scatter(self)

    def __rmatmul__(self, x: Any) -> jax.Array:
        return multiply_slices(_multiply, self, x, self.values.shape[:-2])


def _kept(w: jax.Array, mask: Any) -> jax.Array:
    """The mask in the shape of the weight; errors if one of them does not fit."""
    if w.ndim < 2 or w.shape[-2] * w.shape[-1] >= 2**31:
        raise ValueError(
            f"CSR needs a weight [..., K, N] with K * N < 2**31; got {w.shape}. Split it, or "
            "give it a second axis."
        )
    return w != 0 if mask is None else whole_mask(mask, w.shape)


@jax.jit
def _needs(keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entries and groups of the fullest slice."""
    in_column = jnp.sum(keep, -2, dtype=jnp.int32)
    groups = jnp.sum(-(-in_column // GROUP), -1)
    return jnp.max(jnp.sum(in_column, -1), initial=0), jnp.max(groups, initial=0)


def _index_type(size: int) -> Any:
    return jnp.uint16 if size <= 65535 else jnp.int32


@functools.partial(jax.jit, static_argnums=0)
def _store(
    groups: int, limit: jax.Array | int, w: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, indices and columns of the first `limit` entries kept."""
    store = functools.partial(_store_slice, groups, limit)
    for _ in w.shape[:-2]:
        store = jax.vmap(store)
    return store(w, keep)


def _store_slice(
    groups: int, limit: jax.Array | int, w: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    k, n = w.shape
    before = jnp.cumsum(keep, 0, dtype=jnp.int32)  # in the same column, this one included
    total = before[-1] if k else jnp.zeros(n, jnp.int32)
    earlier = jnp.cumsum(total, dtype=jnp.int32) - total  # in the columns to the left
    keep = keep & (earlier + before <= limit)
    total = jnp.clip(limit - earlier, 0, total)
    ends = jnp.cumsum(-(-total // GROUP), dtype=jnp.int32)
    first = GROUP * jnp.concatenate([jnp.zeros(1, jnp.int32), ends])[:-1]
    place = jnp.where(keep, first + before - 1, GROUP * groups)
    rows = jnp.broadcast_to(jnp.arange(k, dtype=_index_type(k))[:, None], (k, n))
    values = jnp.zeros(GROUP * groups, w.dtype).at[place].set(w, mode="drop")
    indices = jnp.full(GROUP * groups, k, _index_type(k)).at[place].set(rows, mode="drop")
    columns = jnp.searchsorted(ends, jnp.arange(groups, dtype=jnp.int32), side="right")
    return (
        values.reshape(groups, GROUP),
        indices.reshape(groups, GROUP),
        columns.astype(_index_type(n)),
    )


@jax.jit
def _scatter(w: CSR) -> jax.Array:
    def scatter(w: CSR) -> jax.Array:
        zeros = jnp.zeros(w.shape, w.dtype)
        return zeros.at[w.indices, w.columns[:, None]].add(w.values, mode="drop")

    for _ in w.values.shape[:-2]:
        scatter = jax.vmap(scatter)
    return scatter(w)


@jax.jit
def _multiply(w: CSR, x: jax.Array) -> jax.Array:
    """`[..., K]` to `[..., N]`, one slice."""
    out_type = jnp.result_type(x, w.values)
    narrow = jnp.issubdtype(out_type, jnp.floating) and jnp.finfo(out_type).bits < 32
    wide = jnp.dtype(jnp.float32) if narrow else out_type
    k, n = w.shape
    values, columns = w.values.astype(wide), w.columns
    rows = x.reshape(math.prod(x.shape[:-1]), k).astype(wide)
    rows = jnp.concatenate([rows, jnp.zeros((rows.shape[0], 1), wide)], 1)  # row K of w is none
    if rows.shape[0] == 1:
        of_groups = jnp.sum(rows[0].at[w.indices].get(mode="promise_in_bounds") * values, -1)
        y = jnp.zeros(n, wide).at[columns].add(of_groups, mode="drop", indices_are_sorted=True)
    else:  # entry by entry: XLA does not vectorise a sum over the middle axis
        entries = w.indices.reshape(-1)
        terms = rows.T.at[entries].get(mode="promise_in_bounds") * values.reshape(-1, 1)
        columns = jnp.broadcast_to(columns[:, None], w.indices.shape).reshape(-1)
        y = jnp.zeros((n, rows.shape[0]), wide)
        y = y.at[columns].add(terms, mode="drop", indices_are_sorted=True).T
    return y.reshape(*x.shape[:-1], n).astype(out_type)
