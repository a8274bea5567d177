"""Prune a trained model at once, by a score of each leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxsparse._choose import choose
from jaxsparse._masks import apply_masks
from jaxsparse.plans import Plan
from jaxsparse.scores._evidence import ScoreFn, scorer
from jaxsparse.scores._magnitude import magnitude

Tree = Any


def prune(
    params: Tree,
    distribution: Callable[[Tree], Plan],
    score: ScoreFn = magnitude,
    **evidence: Any,
) -> tuple[Tree, Tree]:
    """Remove the units of smallest score. Fine-tune with `sparsify(inner, fixed(masks))`.

    Args:
        params: Parameters, any pytree.
        distribution: Parameters -> `Plan`: `uniform(0.9)`, `erk(0.9)`, `global_(0.9)`, ...
        score: Leaf -> scores, with evidence as keyword-only arguments.
        **evidence: What the score asks for: trees like the parameters (`grad=`, `fisher=`), or
            `key=`, one random key.

    Returns:
        The parameters, exactly zero where pruned, and the mask tree.

    Raises:
        ValueError: If evidence is missing, or the plan does not fit; names the leaf.
        TypeError: If a leaf to be pruned is not real floating-point.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.prune({"w": jnp.array([[3.0, -1.0]])}, jsp.uniform(0.5))
        ({'w': Array([[3., 0.]], dtype=float32)}, {'w': Array([[ True, False]], dtype=bool)})

    Cost: one selection a leaf; see `make_mask`.

    References: Han et al., 2015, arXiv:1506.02626.
    """
    masks = choose(distribution, params, scorer(score, params, evidence))
    return apply_masks(params, masks), masks
