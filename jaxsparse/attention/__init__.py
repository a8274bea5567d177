"""Attention over blocks: one mask type, patterns and selectors that return it, and the kernels."""

from pallas_kernels import (
    BlockMask,
    Prefix,
    Where,
    Window,
    block_sparse_attention,
    merge_attention,
)

__all__ = [
    "BlockMask",
    "Prefix",
    "Where",
    "Window",
    "block_sparse_attention",
    "merge_attention",
]
