"""Products with stored blocks on a mesh: rows of x over devices, and shards of a weight.

Each device multiplies what it holds, inside `jax.shard_map`: a compiler cannot split a kernel. A
sharded weight is a stack of n weights, so that every shard has the same share of slots and its own
topology, whose orders cannot be sliced out of those of the whole; what works on stacked weights
(updaters, checkpoints) works on shards. Splitting columns in one layer and rows in the next costs
one sum over devices for the two: Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Mesh = Any


def column_parallel(
    x: Any,
    w: Any,
    axis: str = "model",
    *,
    rows: P | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`x @ [w_0 | w_1 | ...]` with the shards w_i of a weight over a mesh axis.

    Args:
        x: `[..., K]`, on every device of the axis.
        w: A stack `[n]` of weights (K, N/n), e.g. `BlockSparse.shard(n)`; the size of the mesh axis
            divides n.
        axis: Name of the mesh axis.
        rows: How the leading axes of x lie on the mesh, e.g. `P("data")`. Needed on TPU where mesh
            axes are automatic; elsewhere it is known, or left to the compiler.
        mesh: The mesh; that of `jax.set_mesh` or, with explicit axes, of the arrays if not given.
            Without any, the same is computed on one device.

    Returns:
        `[..., N]`, whose last axis lies over `axis`. Inside `jax.shard_map` over the axis x, w and
        the result are the parts of one device.

    Raises:
        ValueError: If w is not a stack of n weights that fit x, or the mesh axis does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> w = jsp.BlockSparse.random(jax.random.key(0), (8, 16), block=(2, 2), density=0.5)
        >>> x = jnp.ones((3, 8))
        >>> bool(jnp.allclose(jsp.column_parallel(x, w.shard(4)), x @ w, atol=1e-6))
        True

    Cost: no communication forward; backward one sum of the gradient of x over the axis.
    """
    return _parallel(x, w, axis, rows, mesh, by_rows=False)


def row_parallel(
    x: Any,
    w: Any,
    axis: str = "model",
    *,
    rows: P | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`sum_i x_i @ w_i` with the shards w_i of a weight over a mesh axis; x_i are columns of x.

    Args:
        x: `[..., K]`, whose last axis lies over the mesh axis, as `column_parallel` returns it.
        w: A stack `[n]` of weights (K/n, N): `BlockSparse.shard(n).T` of a weight stored as
            [N, K], or a stack of row panels, `from_rows(jnp.stack(jnp.split(w, n)), ...)`.
        axis: Name of the mesh axis.
        rows: See `column_parallel`.
        mesh: See `column_parallel`.

    Returns:
        `[..., N]`, the same on every device of the axis. Shards are summed in the dtype of x.

    Raises:
        ValueError: If w is not a stack of n weights that fit x, or the mesh axis does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> w = jsp.BlockSparse.random(jax.random.key(0), (8, 16), block=(2, 2), density=0.5)
        >>> x = jnp.ones((3, 16))
        >>> bool(jnp.allclose(jsp.row_parallel(x, w.shard(4).T), x @ w.T, atol=1e-6))
        True

    Cost: one sum of the result over the axis forward; no communication backward.
    """
    return _parallel(x, w, axis, rows, mesh, by_rows=True)


def _parallel(
    x: Any, w: Any, axis: str, rows: P | None, mesh: Mesh | None, *, by_rows: bool
) -> jax.Array:
    x = jnp.asarray(x)
    shards = _check(x, w, by_rows)
    mesh = _mesh_of(x, w) if mesh is None else mesh
    manual = mesh is not None and axis in getattr(mesh, "manual_axes", ())
    if mesh is not None and axis not in mesh.axis_names:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, none of which is {axis!r}: say with axis= "
            "which one the shards lie on."
        )
    if mesh is None or manual:
        y = _products(x, w, by_rows)
        return lax.psum(y, axis) if manual and by_rows else y
    if shards % mesh.shape[axis]:
        raise ValueError(
            f"{shards} shards do not divide over the {mesh.shape[axis]} devices of the mesh axis "
            f"{axis!r}: make a multiple of it, e.g. w.shard({mesh.shape[axis]})."
        )

    def local(x: jax.Array, w: Any) -> jax.Array:
        y = _products(x, w, by_rows)
        return lax.psum(y, axis) if by_rows else y

    lead = _rows_of(x, rows, axis if by_rows else None)
    into, out = (axis, None) if by_rows else (None, axis)
    return _shard_map(local, mesh, x, w, P(*lead, into), P(axis), P(*lead, out), {axis})


def _products(x: jax.Array, w: Any, by_rows: bool) -> jax.Array:
    """The products with the shards here, side by side or summed."""
    here = jax.tree.leaves(w)[0].shape[0]
    slices = [jax.tree.map(lambda a, i=i: a[i], w) for i in range(here)]
    if by_rows:
        panels = jnp.split(x, here, axis=-1)
        y, *others = (p @ s for p, s in zip(panels, slices, strict=True))
        for part in others:
            y = y + part
        return y
    return jnp.concatenate([x @ s for s in slices], axis=-1)


def multiply_rows(multiply: Callable[[Any, jax.Array], jax.Array], w: Any, x: Any) -> jax.Array:
    """`multiply(w, x)`; on a mesh with explicit axes each device does its own part.

    Args:
        multiply: A weight and `[*stack, ..., K]` to `[*stack, ..., N]`.
        w: The weight, stacked or not; its arrays lie on the mesh as the stacked axes of x do, and
            are gathered if they do not.
        x: Sharded along any axis but the last.
    """
    x = jnp.asarray(x)
    mesh = _mesh_of(x, w)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return multiply(w, x)
    lead = _rows_of(x, None, None)
    stack = P(*lead[: w.values.ndim - 3])
    return _shard_map(
        lambda x, w: multiply(w, x), mesh, x, w, P(*lead, None), stack, P(*lead, None), set()
    )


def _shard_map(
    local: Callable[..., Any],
    mesh: Mesh,
    x: jax.Array,
    w: Any,
    x_spec: P,
    w_spec: P,
    out: P,
    axes: set[str],
) -> jax.Array:
    """`local(x, w)` on the parts of each device over the explicit axes and those named."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = {name for name, kind in kinds if kind is AxisType.Explicit}
    named = {name for part in x_spec for name in (part if isinstance(part, tuple) else (part,))}
    axes = axes | explicit | (named - {None})

    def lay(a: jax.Array, spec: P) -> jax.Array:
        return jax.sharding.reshard(a, NamedSharding(mesh, spec)) if explicit else a

    x, w = lay(x, x_spec), jax.tree.map(lambda a: lay(a, w_spec), w)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=out, axis_names=axes
    )
    return mapped(x, w)


def _mesh_of(x: jax.Array, w: Any) -> Mesh | None:
    """The mesh of the context, or that on whose explicit axes an array lies."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh
    for leaf in (x, *jax.tree.leaves(w)):
        sharding = jax.typeof(leaf).sharding
        if not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types:
            return sharding.mesh
    return None


def _rows_of(x: jax.Array, rows: P | None, last: str | None) -> tuple[Any, ...]:
    """How the leading axes of x lie on the mesh, as far as its type or `rows` tells."""
    known = tuple(jax.typeof(x).sharding.spec)
    known += (None,) * (x.ndim - len(known))
    if known[-1] not in (None, last):
        raise ValueError(
            f"the last axis of x lies over the mesh axis {known[-1]!r}, but is multiplied whole. "
            "Multiply with row_parallel, or gather it first: jax.sharding.reshard(x, ...)."
        )
    lead = known[:-1]
    if rows is not None:
        lead = (*rows, *(None,) * (x.ndim - 1 - len(rows)))
    return lead


def _check(x: jax.Array, w: Any, by_rows: bool) -> int:
    """The number of shards."""
    if w.values.ndim != 4:
        raise ValueError(
            "a sharded weight is a stack [n] of weights, with values [n, S, bk, bn]; got values "
            f"{w.values.shape}. Make it with w.shard(n), and scan over further axes."
        )
    shards = w.values.shape[0]
    want = w.shape[0] * (shards if by_rows else 1)
    if x.ndim < 1 or x.shape[-1] != want:
        what = f"{shards} shards of shape {w.shape}"
        how = "split its rows" if by_rows else "split its columns"
        raise ValueError(
            f"{what} {how}, so the last axis of x must be {want}; got {x.shape}. "
            "row_parallel takes shards (K/n, N), column_parallel shards (K, N/n)."
        )
    return shards
