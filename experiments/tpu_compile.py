"""Compile for a TPU without one: the compiler in the `libtpu` wheel runs on any x86-64 Linux.

It refuses what interpret mode does not: tiles, layouts, VMEM and scalar memory overflow. What it
makes can be read (`as_text`, `memory_analysis`, the schedule) and not run. Needs the extra
`test-kernels`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
AVAILABLE = importlib.util.find_spec("libtpu") is not None
# Read by libtpu when it is first used.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no search for a cloud metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # for parallel test processes
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v6e-4",  # this and the next two silence warnings
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def device(topology: str) -> Any:
    """A device of a topology as libtpu names it; programs can be compiled for it, not run."""
    return devices_of(topology)[0]


@functools.cache
def devices_of(topology: str) -> Any:
    """All devices of a topology, such as the 16 chips of "v5e:4x4"."""
    if not AVAILABLE:
        raise NotImplementedError("compiling for a TPU needs libtpu: pip install '.[test-kernels]'")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@contextlib.contextmanager
def scope(topology: str) -> Iterator[None]:
    """Let code that asks for the device while it is traced see one of `topology`."""
    it = device(topology)
    abstract = AbstractDevice(device_kind=it.device_kind, num_cores=it.num_cores, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        yield


def compile_for(topology: str, function: Callable[..., Any], *structs: Any) -> jax.stages.Compiled:
    """`function` compiled for a device of `topology`, from trees of `jax.ShapeDtypeStruct`."""
    sharding = SingleDeviceSharding(device(topology))
    structs = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), structs
    )
    with scope(topology):
        # A new function each time: jax would answer a second call from its cache, unseen by libtpu.
        return jax.jit(lambda *operands: function(*operands)).trace(*structs).lower().compile()


def vmem(compiled: jax.stages.Compiled) -> int:
    """Bytes of VMEM of the kernel that takes most."""
    text = compiled.as_text() or ""
    records = re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', text)
    return max(int(size) for record in records for size in re.findall(r'"size":"(\d+)"', record))
