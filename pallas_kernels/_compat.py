"""Differences between JAX versions and between devices that kernels need to know, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What tile choices depend on. The defaults suit every TPU from v5 on.

    Attributes:
        vmem: Bytes of VMEM of a core.
        mxu: Side of the matrix unit: 128, or 256 from v6e on.
        cores: TensorCores of a device; 2 where they share the work of one kernel.
        name: Of the file in `tuned/`, such as "tpu_v5e"; "" for a device that is not known.
    """

    vmem: int = 64 * 2**20
    mxu: int = 256
    cores: int = 1
    name: str = ""


def tpu() -> Tpu:
    """The TPU that traced code will run on; the default without one, or for one not known."""
    if not pltpu.is_tpu_device():
        return Tpu()
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # JAX is older than the device
        return Tpu()
    name = f"tpu_{info.chip_version}"
    return Tpu(info.vmem_capacity_bytes, info.mxu_column_size, info.num_cores, name)


def races_found() -> bool:
    """Whether the last kernel in TPU interpret mode raced: a race is only printed before JAX 0.12.

    Where a race raises by itself this is never reached. The state is private to JAX.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    return races is not None and bool(races.races_found)


def gpu_races_found() -> bool:
    """Whether the last kernel in GPU interpret mode raced; see `races_found`."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    races = interpret_pallas_call.get_races()
    return races is not None and bool(races.races_found)


def has_ragged_all_to_all() -> bool:
    """Whether the device that traced code will run on can send rows of uneven number."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.devices()[0].platform if described is None else described.platform
    return platform != "cpu"


def streaming_multiprocessors() -> int:
    """SMs of the GPU that traced code will run on; 132, those of an H100 or H200, without one."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform == "gpu":
        return described.num_cores
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def gpu_row(row: Any, axis: int = 1) -> jax.Array:
    """Entries of a reference in global or shared memory, along one axis of wgmma sums."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # JAX 0.10 takes an index, 0.12 takes none.
    index: Any = () if jax.__version_info__ >= (0, 11) else ((),)
    return plgpu.load(row, *index, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


# What Mosaic GPU lowers entry by entry. erf, expm1, log1p and others are not among it.
_GPU_OPERATIONS = set(
    "abs add convert_element_type cos div eq exp exp2 ge gt integer_pow jit le log logistic lt max "
    "min mul ne neg pjit rsqrt select_n sign sin square sub tanh".split()
)
if jax.__version_info__ >= (0, 12):
    _GPU_OPERATIONS |= {"custom_jvp_call", "sqrt"}


_GPU_RULE_OPERATIONS = _GPU_OPERATIONS | set("and or rem xor".split())


def runs_in_gpu_kernel(function: Callable[[jax.Array], jax.Array]) -> bool:
    """Whether Mosaic GPU has every operation of a function of float32 entries."""
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((64, 64), jnp.float32))
    names = {equation.primitive.name for equation in _equations(closed.jaxpr)}
    return not closed.consts and _GPU_OPERATIONS.issuperset(names)


def rule_runs_in_gpu_kernel(rule: Callable[[jax.Array, jax.Array], jax.Array]) -> bool:
    """Whether Mosaic GPU has every operation of a rule about the positions of tokens."""
    closed = jax.make_jaxpr(rule)(*[jax.ShapeDtypeStruct((64, 64), jnp.int32)] * 2)

    def known(equation: Any) -> bool:
        name = equation.primitive.name
        if name == "broadcast_in_dim":
            return not equation.invars[0].aval.shape
        # To a bool it keeps the lowest bit, where JAX asks whether any is set.
        to_bool = name == "convert_element_type" and equation.params["new_dtype"] == jnp.bool
        return name in _GPU_RULE_OPERATIONS and not to_bool

    return not closed.consts and all(map(known, _equations(closed.jaxpr)))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of those inside them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
