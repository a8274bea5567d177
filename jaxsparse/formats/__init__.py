"""Weights stored without their zeros, for `x @ w`."""

from jaxsparse.formats._block_sparse import BlockSparse
from jaxsparse.formats._csr import CSR
from jaxsparse.formats._nm_packed import NMPacked
from jaxsparse.formats._protocol import SparseWeight

__all__ = ["BlockSparse", "CSR", "NMPacked", "SparseWeight"]
