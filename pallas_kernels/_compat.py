"""Differences between JAX versions and between devices that kernels need to know, in one place."""

from __future__ import annotations

import dataclasses

from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What tile choices depend on. The defaults suit every TPU from v5 on.

    Attributes:
        vmem: Bytes of VMEM of a core.
        mxu: Side of the matrix unit: 128, or 256 from v6e on.
        cores: TensorCores of a device; 2 where they share the work of one kernel.
    """

    vmem: int = 64 * 2**20
    mxu: int = 256
    cores: int = 1


def tpu() -> Tpu:
    """The TPU that traced code will run on; the default without one, or for one not known."""
    if not pltpu.is_tpu_device():
        return Tpu()
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # JAX is older than the device
        return Tpu()
    return Tpu(info.vmem_capacity_bytes, info.mxu_column_size, info.num_cores)


def races_found() -> bool:
    """Whether the last kernel in TPU interpret mode raced: a race is only printed before JAX 0.12.

    Where a race raises by itself this is never reached. The state is private to JAX.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    return races is not None and bool(races.races_found)
