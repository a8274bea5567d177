"""Pallas kernels for TPU and GPU, each with an XLA form that runs everywhere; imports jax only."""

from pallas_kernels._block_sparse_gated import block_sparse_gated
from pallas_kernels._block_sparse_matmul import block_sparse_matmul, todense
from pallas_kernels._topology import Topology, check_topology, plan

__all__ = [
    "Topology",
    "block_sparse_gated",
    "block_sparse_matmul",
    "check_topology",
    "plan",
    "todense",
]
