"""Pallas kernels for TPU and GPU, each with an XLA form that runs everywhere; imports jax only."""

from pallas_kernels._block_mask import BlockMask
from pallas_kernels._block_sparse_attention import block_sparse_attention
from pallas_kernels._block_sparse_gated import block_sparse_gated
from pallas_kernels._block_sparse_matmul import block_sparse_matmul, todense
from pallas_kernels._grouped_ffn import grouped_ffn
from pallas_kernels._grouped_matmul import grouped_matmul
from pallas_kernels._merge_attention import merge_attention
from pallas_kernels._sparse_decode import check_pages, sparse_decode_attention
from pallas_kernels._token_rules import Prefix, Where, Window
from pallas_kernels._topology import Topology, check_topology, plan

__all__ = [
    "BlockMask",
    "Prefix",
    "Topology",
    "Where",
    "Window",
    "block_sparse_attention",
    "block_sparse_gated",
    "block_sparse_matmul",
    "check_pages",
    "check_topology",
    "grouped_ffn",
    "grouped_matmul",
    "merge_attention",
    "plan",
    "sparse_decode_attention",
    "todense",
]
