"""TPU kernels without a TPU: interpret mode, and the TPU compiler of the `libtpu` wheel."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments.tpu_compile import AVAILABLE, TOPOLOGIES, compile_for, scope, vmem

__all__ = ["TOPOLOGIES", "compile_for", "interpret", "needs_libtpu", "scope", "vmem"]

needs_libtpu = pytest.mark.skipif(not AVAILABLE, reason="needs the extra test-kernels")


def interpret(**options):
    """Interpret mode that finds races and reads of memory that nobody wrote."""
    return pltpu.InterpretParams(**{"detect_races": True, "uninitialized_memory": "nan", **options})
