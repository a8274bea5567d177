"""Paths, tables and shardings: what every room needs to speak about the leaves of a tree."""

from __future__ import annotations

import difflib
import fnmatch
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = Any


def path_str(path: tuple[Any, ...]) -> str:
    """`layers/0/up/kernel`; the `/value` that NNX variables add at the end is dropped."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def paths(tree: Tree) -> list[str]:
    """The path of each leaf, in flatten order."""
    return [path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def same_structure(tree: Tree, reference: Tree, what: str) -> None:
    """Raise a ValueError that names the first path that only one of two trees has."""
    in_containers_of(reference, tree, what)


def in_containers_of(reference: Tree, tree: Tree, what: str) -> Tree:
    """The leaves of `tree` in the containers of `reference`, which has the same paths.

    Containers differ where NNX wraps them: a `Param` in a model, an `OptVariable` in the state of
    its `nnx.Optimizer`.
    """
    treedef = jax.tree.structure(reference)
    if jax.tree.structure(tree) == treedef:
        return tree
    here, there = paths(tree), paths(reference)
    if here == there:
        return treedef.unflatten(jax.tree.leaves(tree))
    missing = [p for p in there if p not in set(here)]
    extra = [p for p in here if p not in set(there)]
    detail = (
        f"no leaf for {missing[0]}"
        if missing
        else f"a leaf {extra[0]} that the parameters lack"
        if extra
        else f"the leaves in another order: {here}, not {there}"
    )
    raise ValueError(f"{what} must have the structure of the parameters, but have {detail}.")


def matches(rule: str | Callable[[str, Any], bool], path: str, leaf: Any) -> bool:
    """Whether a glob or a predicate `(path, leaf) -> bool` selects a leaf."""
    return fnmatch.fnmatchcase(path, rule) if isinstance(rule, str) else bool(rule(path, leaf))


def unmatched(rule: str | Callable[..., bool], names: Sequence[str], argument: str) -> ValueError:
    """The error for a glob or predicate that selects no leaf, with near matches."""
    what = f"{rule!r}" if isinstance(rule, str) else f"the predicate {rule}"
    text = rule if isinstance(rule, str) else ""
    near = difflib.get_close_matches(text.strip("*/"), names, n=3, cutoff=0.3) or list(names[:3])
    return ValueError(
        f"{argument}: {what} matches no leaf. Near: {', '.join(near)}. A glob is matched against "
        "the whole path, so write '*/kernel' for every leaf named kernel."
    )


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, whatever other leaves there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a random key or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds real floating-point numbers."""
    return jnp.issubdtype(dtype_of(leaf), jnp.floating)


def zero_unless(condition: jax.Array, x: Any) -> Any:
    """`x` where the scalar holds, else zeros; random keys as they are."""
    if jnp.issubdtype(dtype_of(x), jax.dtypes.extended):
        return x
    return jnp.where(condition, x, jnp.zeros((), dtype_of(x)))


def in_auto_mode(
    fn: Callable[..., Any], like: jax.Array, *args: Any, replicated: bool = False
) -> Any:
    """`fn(like, *args)`, sharded as `like` or replicated, the compiler choosing shardings inside.

    On a mesh with explicit axes a reshape or a scatter of a sharded array is an error unless every
    sharding is spelled out; inside, the axes are automatic.
    """
    sharding = getattr(jax.typeof(like), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return fn(like, *args)
    out = NamedSharding(mesh, PartitionSpec()) if replicated else sharding
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(fn, out_sharding=out)(like, *args)


def in_auto_mode_as(out: Tree, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, whose results are sharded as the leaves of `out`, as in `in_auto_mode`."""
    shardings = jax.tree.map(lambda a: jax.typeof(a).sharding, out)
    meshes = [s.mesh for s in jax.tree.leaves(shardings) if AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return fn(*args)
    with jax.sharding.use_abstract_mesh(meshes[0]):
        return jax.sharding.auto_axes(fn, out_sharding=shardings)(*args)


def with_type_of(x: Any, aval: jax.ShapeDtypeStruct) -> Any:
    """`x` with the dtype of `aval` and, on a mesh with explicit axes, its sharding."""
    if dtype_of(x) != aval.dtype:
        x = jnp.asarray(x, aval.dtype)
    sharding = getattr(aval, "sharding", None)
    explicit = AxisType.Explicit in getattr(getattr(sharding, "mesh", None), "axis_types", ())
    if not explicit or jax.typeof(x).sharding == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


@jax.jit
def uniform_noise(key: jax.Array, like: jax.Array) -> jax.Array:
    """Noise in [0, 1), float32 in steps of 2**-24, of the shape and sharding of `like`.

    NaN where `like` is NaN. So a NaN weight is never kept, and noise depends on the weight, whose
    sharding it then takes. Bits are a keyed hash of the index (the finalizer of MurmurHash3, which
    mixes every bit of the index into every bit of the hash): good enough to choose weights at
    random, and a tenth of the time of `jax.random.bits` on a CPU.
    """

    def noise(like: jax.Array, key: jax.Array) -> jax.Array:
        before, between = jax.random.bits(key, (2,), jnp.uint32)
        index = jnp.zeros(like.shape, jnp.uint32)
        for axis, size in enumerate(like.shape):
            index = index * jnp.uint32(size & 0xFFFFFFFF)
            index = index + lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        bits = index ^ before
        bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
        bits = ((bits ^ bits >> 13) ^ between) * jnp.uint32(0xC2B2AE35)
        bits = (bits ^ bits >> 16) >> 8
        drawn = bits.astype(jnp.float32) * jnp.float32(2**-24)
        return jnp.where(jnp.isnan(like), jnp.nan, drawn)

    return in_auto_mode(noise, like, key)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to equal width: the first to the left, the others to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def render(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])
