"""Weights stored without their zeros, for `x @ w`."""

from jaxsparse.formats._block_sparse import BlockSparse
from jaxsparse.formats._condensed import Condensed
from jaxsparse.formats._csr import CSR
from jaxsparse.formats._gated import gated_product
from jaxsparse.formats._nm_packed import NMPacked
from jaxsparse.formats._protocol import SparseWeight
from jaxsparse.formats._sharded import column_parallel, row_parallel

__all__ = [
    "BlockSparse",
    "CSR",
    "Condensed",
    "NMPacked",
    "SparseWeight",
    "column_parallel",
    "gated_product",
    "row_parallel",
]
