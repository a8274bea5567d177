"""What a training token of a `Transformer` costs, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from models.transformer import Config, Transformer


def training_flops(config: Config, kept: Mapping[str, float] | None = None) -> dict[str, float]:
    """FLOPs of one token in one training step (forward and backward), for each matrix.

    A weight that is there costs a multiplication and an addition in three products: forward, the
    gradient of the input, the gradient of the weight; so 6 FLOPs a token. The entry `attention`
    holds the two products of queries, keys and values over the tokens that one sees on average:
    (context + 1) / 2 if dense, else the listed blocks, and what chooses them. Norms, rotations,
    softmax and the optimizer are left out, and looking up an embedding is no product.

    Args:
        config: the model.
        kept: share of kept weights (0..1) by path, such as `layers/mlp/up/kernel`; 1 where absent.

    Returns:
        FLOPs by path; `sum(...values())` is the token.

    Raises:
        ValueError: `kept` names a path that is no matrix of the model.

    Example:
        >>> from models.transformer import SIZES
        >>> dense = training_flops(SIZES["tiny"])
        >>> sparse = training_flops(SIZES["tiny"], {"layers/mlp/up/kernel": 0.1})
        >>> sparse["layers/mlp/up/kernel"] / dense["layers/mlp/up/kernel"]
        0.1
    """
    kept = dict(kept or {})
    flops = {}
    for path, shape in parameter_shapes(config).items():
        if path.endswith("kernel") or (config.tied and path == "embed/embedding"):
            flops[path] = 6.0 * math.prod(shape) * float(kept.pop(path, 1.0))
    if kept:
        raise ValueError(f"No matrix {sorted(kept)} in the model; it has {sorted(flops)}.")
    flops["attention"] = 3.0 * config.layers * config.attention.flops(config)
    return flops


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by path; nothing is allocated.

    Example:
        >>> from models.transformer import SIZES
        >>> parameter_shapes(SIZES["1b"])["layers/mlp/up/kernel"]
        (22, 2048, 5632)
    """
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves)
    return {path.removesuffix("/value"): tuple(np.shape(x)) for path, x in named}


def parameter_count(config: Config) -> int:
    """Number of parameters, embedding and norms included.

    Example:
        >>> from models.transformer import SIZES
        >>> round(parameter_count(SIZES["1b"]) / 1e6)
        970
    """
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())
