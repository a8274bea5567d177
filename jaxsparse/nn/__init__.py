"""flax.nnx layers on sparse weights, and surgery that puts them into a model."""

from jaxsparse.nn._moe import MoE, Routed, RouterState
from jaxsparse.nn._sparse_linear import SparseLinear
from jaxsparse.nn._sparse_mlp import SparseGatedMLP
from jaxsparse.nn._surgery import replace, sparse_linears

__all__ = [
    "MoE",
    "Routed",
    "RouterState",
    "SparseGatedMLP",
    "SparseLinear",
    "replace",
    "sparse_linears",
]
