"""Kernel operations: one meaning, several implementations, and the choice among them.

`"tpu"` is Pallas for TPU, `"gpu"` Mosaic GPU for Hopper (compute capability 9.0), `"xla"` plain JAX
for a CPU and every other device; it is also the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
