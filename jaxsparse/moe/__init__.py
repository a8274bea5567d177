"""Mixture of experts: routers, their losses and statistics, and tokens to experts and back."""

from jaxsparse.moe._dispatch import Dispatch, apply_experts, combine, dispatch, spread
from jaxsparse.moe._expert_choice import expert_choice, threshold_choice
from jaxsparse.moe._expert_parallel import exchanged, gathered
from jaxsparse.moe._gates import Gate, linear_gate, mean_key_gate, sparsity_gate, task_gate
from jaxsparse.moe._reduce import (
    Usage,
    alike,
    among,
    expert_saliency,
    merge_experts,
    proficiency,
    survivors,
    take_experts,
    usage,
)
from jaxsparse.moe._relu_router import chunk_loss, locality_loss, relu_router
from jaxsparse.moe._routing import (
    Router,
    Routing,
    Statistics,
    balance_loss,
    counts,
    limited,
    statistics,
    z_loss,
)
from jaxsparse.moe._token_choice import loss_free, token_choice
from jaxsparse.moe._top_p import top_p
from jaxsparse.moe._unlearned import given, hashed, random
from jaxsparse.moe._upcycle import upcycle, upcycle_state

__all__ = [
    "Dispatch",
    "Gate",
    "Router",
    "Routing",
    "Statistics",
    "Usage",
    "alike",
    "among",
    "apply_experts",
    "balance_loss",
    "chunk_loss",
    "combine",
    "counts",
    "dispatch",
    "exchanged",
    "expert_choice",
    "expert_saliency",
    "gathered",
    "given",
    "hashed",
    "limited",
    "linear_gate",
    "locality_loss",
    "loss_free",
    "mean_key_gate",
    "merge_experts",
    "proficiency",
    "random",
    "relu_router",
    "sparsity_gate",
    "spread",
    "statistics",
    "survivors",
    "take_experts",
    "task_gate",
    "threshold_choice",
    "token_choice",
    "top_p",
    "upcycle",
    "upcycle_state",
    "usage",
    "z_loss",
]
