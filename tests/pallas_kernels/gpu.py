"""Hopper kernels without a GPU: interpret mode, lowering, and ptxas of the CUDA wheels.

The last needs the extra test-gpu: `pip install -e '.[test,test-gpu]'`, no cuDNN and no cuBLAS. With
it, run other tests under JAX_PLATFORMS=cpu, else JAX says that a GPU is missing.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import re

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="GPU interpret mode works from JAX 0.11 on"
)
needs_ptxas = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax_cuda13_plugin", "nvidia")),
    reason="needs the extra test-gpu",
)
SMS = 132


def interpret(**options):
    """Interpret mode that finds races."""
    return plgpu.InterpretGPUParams(**{"detect_races": True, **options})


def lower(function, *operands):
    """The text of `function`, lowered for a GPU of compute capability 9.0."""
    traced = jax.jit(lambda *a: function(*a)).trace(*operands)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@functools.cache
def device():
    """An H200 that nothing can be run on."""
    config = pathlib.Path(__file__).with_name("h200.txtpb").read_text()
    described = topologies.get_topology_desc(
        platform="cuda", target_config=config, topology="1x1x1"
    )
    return described.devices[0]


@dataclasses.dataclass(frozen=True)
class Binary:
    """What ptxas and Mosaic GPU say of a kernel.

    Attributes:
        registers: Of a thread at launch; warpgroups exchange them later.
        spilled: Bytes stored and loaded.
        shared: Bytes of shared memory, less barriers; 0 where JAX does not tell (0.10).
        serialized: Whether ptxas had to wait for each wgmma.
        waits: Whether each wgmma is waited for, but one, before a buffer is handed back. Interpret
            mode runs wgmma at once and cannot see that.
        wgmma: Shapes of the wgmma instructions.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    serialized: bool
    waits: bool
    wgmma: frozenset


def compile_kernels(folder, monkeypatch, function, *structs):
    """The kernels of `function`, compiled for an H200; `folder` takes the files of the compiler."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    place = SingleDeviceSharding(device())
    structs = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), structs
    )
    abstract = AbstractDevice(device_kind=device().device_kind, num_cores=SMS, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        # A new function, since a compiled one leaves no files.
        jax.jit(lambda *a: function(*a)).trace(*structs).lower().compile()
    return [_read(path) for path in sorted(folder.glob("*.ptxas"))]


def _read(path):
    said, ptx = path.read_text(), path.with_suffix(".ptx").read_text()
    resources = path.with_suffix(".resources.txt")
    number = lambda pattern, text: sum(map(int, re.findall(pattern, text)))  # noqa: E731
    after_commit = r"wgmma\.commit_group.*?(wait_group\.sync\.aligned\s+\d|mbarrier\.arrive)"
    return Binary(
        name=re.sub(r"_\d+$", "", path.stem),
        registers=number(r"Used (\d+) registers", said),
        spilled=number(r"(\d+) bytes spill", said),
        shared=number(r"smem_scratch_bytes=(\d+)", resources.read_text())
        if resources.exists()
        else 0,
        serialized="serialized" in said,
        waits=all(found.endswith("1") for found in re.findall(after_commit, ptx, re.DOTALL)),
        wgmma=frozenset(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)),
    )
