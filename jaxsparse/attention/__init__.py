"""Attention over blocks: one mask type, patterns and selectors that return it, and the kernels."""

from jaxsparse.attention._block_patterns import (
    bigbird,
    block_pattern,
    pixelfly,
    power_attention,
    random_blocks,
    s2,
)
from jaxsparse.attention._compress import MLPCompressor, PoolCompressor, compress
from jaxsparse.attention._document_patterns import anchor_window, block_rank, documents, segment_ids
from jaxsparse.attention._grid_patterns import blocked_order, neighbourhood, uniba
from jaxsparse.attention._nsa import (
    KeyValue,
    NSASizes,
    all_queries,
    compressed_attention,
    first_query,
    nsa_attention,
)
from jaxsparse.attention._pages import (
    append_to_pages,
    page_bounds,
    page_means,
    page_scores,
    select_pages,
    to_pages,
)
from jaxsparse.attention._picture import draw, plot
from jaxsparse.attention._rules import Chunks, Columns, QueriesFrom, Stride
from jaxsparse.attention._select import (
    block_scores,
    max_pool,
    mean_pool,
    top_k_blocks,
    top_p_blocks,
)
from jaxsparse.attention._window_patterns import causal, fixed, moa, sinks, sliding_window, strided
from pallas_kernels import (
    BlockMask,
    Prefix,
    Where,
    Window,
    block_sparse_attention,
    check_pages,
    merge_attention,
    sparse_decode_attention,
)

__all__ = [
    "BlockMask",
    "Chunks",
    "Columns",
    "KeyValue",
    "MLPCompressor",
    "NSASizes",
    "PoolCompressor",
    "Prefix",
    "QueriesFrom",
    "Stride",
    "Where",
    "Window",
    "all_queries",
    "anchor_window",
    "append_to_pages",
    "bigbird",
    "block_pattern",
    "block_rank",
    "block_scores",
    "block_sparse_attention",
    "blocked_order",
    "causal",
    "check_pages",
    "compress",
    "compressed_attention",
    "documents",
    "draw",
    "first_query",
    "fixed",
    "max_pool",
    "mean_pool",
    "merge_attention",
    "moa",
    "neighbourhood",
    "nsa_attention",
    "page_bounds",
    "page_means",
    "page_scores",
    "pixelfly",
    "plot",
    "power_attention",
    "random_blocks",
    "s2",
    "segment_ids",
    "select_pages",
    "sinks",
    "sliding_window",
    "sparse_decode_attention",
    "strided",
    "to_pages",
    "top_k_blocks",
    "top_p_blocks",
    "uniba",
]
