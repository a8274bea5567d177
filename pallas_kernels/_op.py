"""Kernel operations: one meaning, several implementations, and the choice among them.

`"tpu"` is Pallas for TPU, `"gpu"` Mosaic GPU for Hopper (compute capability 9.0), `"xla"` plain JAX
for a CPU and every other device; it is also the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class KernelOp(NamedTuple):
    """An operation as tests, benchmarks and tuner see it.

    Attributes:
        name: As users import it.
        fn: The public function.
        reference: The same in dense float32 arithmetic.
        implementations: By name; what an implementation is made of, the file of `fn` says.
        cases: Shapes that every implementation must handle.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    implementations: Mapping[str, Any]
    cases: tuple[Any, ...]


def sum_type(dtype: Any) -> Any:
    """The type in which products are summed: float64 for float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def finish(
    sums: jax.Array, bias: jax.Array | None, activation: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """activation(sums + bias) in the type of the sums; either may be None."""
    sums = sums if bias is None else sums + bias.astype(sums.dtype)
    return sums if activation is None else activation(sums)


def here() -> str:
    """Name of the best implementation for the default device."""
    device = jax.devices()[0]
    if device.platform == "tpu":
        return "tpu"
    return "gpu" if getattr(device, "compute_capability", None) == "9.0" else "xla"


def choose(name: str, implementations: Mapping[str, Any], implementation: str | None) -> str:
    """The implementation to run: the one asked for, or the best that this device and `name` have.

    Raises:
        ValueError: If there is no implementation of that name.
        NotImplementedError: If the device cannot run it.
    """
    if implementation is None:
        return here() if here() in implementations else "xla"
    if implementation not in implementations:
        raise ValueError(
            f"{name} has the implementations {sorted(implementations)}; got {implementation!r}."
        )
    if implementation not in ("xla", here()):
        needs = {"tpu": "a TPU", "gpu": "a GPU of compute capability 9.0 (Hopper)"}
        raise NotImplementedError(
            f"{name}: implementation={implementation!r} needs {needs[implementation]}; this is "
            f"{jax.devices()[0].device_kind}. Leave implementation out, or take 'xla'."
        )
    return implementation


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each varying over every mesh axis over which one of them does.

    Inside `jax.shard_map` an array is typed by the axes over which devices hold different values.
    The carry of a loop must begin with the type it ends with, and a `custom_vjp` returns gradients
    of the types of its arguments; the transpose of this cast sums them over the devices.
    """
    axes = frozenset[Any]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))

    def cast(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(a).manual_axis_type.varying))
        return lax.pcast(a, missing, to="varying") if missing else a

    return tuple(map(cast, arrays))


def sum_to(a: jax.Array, like: jax.Array) -> jax.Array:
    """The sum of `a` over the mesh axes over which `a` varies and `like` does not."""
    axes = jax.typeof(a).manual_axis_type.varying - jax.typeof(like).manual_axis_type.varying
    return lax.psum(a, tuple(sorted(axes))) if axes else a


def result_like(x: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """What a kernel returns: of the dtype of x, varying over the mesh axes over which x does."""
    return jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def in_turn(run: Callable[..., Any], batched: Any, *operands: Any) -> Any:
    """Map over a leading axis by a loop, for what has no batched form, or a slow one.

    `batched` says of each leaf of the operands whether it has that axis.
    """
    leaves, tree = jax.tree.flatten(operands)
    over = jax.tree.leaves(batched)

    def one(slices: list[jax.Array]) -> Any:
        rest = iter(slices)
        parts = [next(rest) if b else leaf for leaf, b in zip(leaves, over, strict=True)]
        return run(*jax.tree.unflatten(tree, parts))

    return lax.map(one, [leaf for leaf, b in zip(leaves, over, strict=True) if b])
