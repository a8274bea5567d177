"""TPU kernels without a TPU: interpret mode, and the TPU compiler of the `libtpu` wheel."""

import contextlib
import functools
import importlib.util
import os
import re

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra test-kernels"
)
# Read by libtpu when it is first used.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no search for a cloud metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # for parallel test processes
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v6e-4",  # this and the next two silence warnings
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def interpret(**options):
    """Interpret mode that finds races and reads of memory that nobody wrote."""
    return pltpu.InterpretParams(**{"detect_races": True, "uninitialized_memory": "nan", **options})


@functools.cache
def device(topology):
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


@contextlib.contextmanager
def scope(topology):
    """Let code that asks for the device while it is traced see one of `topology`."""
    it = device(topology)
    abstract = AbstractDevice(device_kind=it.device_kind, num_cores=it.num_cores, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        yield


def compile_for(topology, function, *structs):
    """`function` compiled for a device of `topology`; it cannot be run."""
    sharding = SingleDeviceSharding(device(topology))
    structs = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), structs
    )
    with scope(topology):
        return jax.jit(function).trace(*structs).lower().compile()


def vmem(compiled):
    """Bytes of VMEM of the kernel that takes most."""
    records = re.findall(r'"used_scoped_memory_configs":\[([^\]]*)\]', compiled.as_text())
    return max(int(size) for record in records for size in re.findall(r'"size":"(\d+)"', record))
