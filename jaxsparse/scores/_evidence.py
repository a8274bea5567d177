"""Which evidence a score asks for, and how it is handed over leaf by leaf."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxsparse import _tree

Tree = Any
ScoreFn = Callable[..., jax.Array]


def needs(score: ScoreFn) -> tuple[str, ...]:
    """Names of the keyword-only arguments without a default: `grad`, `key`, `fisher`, ..."""
    parameters = inspect.signature(score).parameters.values()
    empty = inspect.Parameter.empty
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is empty)


def scorer(score: ScoreFn, params: Tree, evidence: dict[str, Any]) -> Callable[[int], jax.Array]:
    """Leaf index -> scores of that leaf.

    Args:
        score: leaf -> scores; its keyword-only arguments name the evidence it needs.
        params: Parameters.
        evidence: Trees like the parameters; `key` is one random key, from which each leaf gets its
            own. What the score does not ask for is left alone.

    Raises:
        ValueError: If evidence is missing or does not have the structure of the parameters.
    """
    names = needs(score)
    for name in names:
        if evidence.get(name) is None:
            raise ValueError(
                f"the score {getattr(score, '__name__', score)} needs {name}=: pass it by keyword, "
                f"as in prune(params, distribution, score, {name}=...) or "
                f"tx.update(grads, state, params, {name}=...)."
            )
        if name != "key":
            _tree.same_structure(evidence[name], params, f"{name}=")
    paths, weights = _tree.paths(params), jax.tree.leaves(params)
    trees = {name: jax.tree.leaves(evidence[name]) for name in names if name != "key"}

    def of_leaf(i: int) -> jax.Array:
        arguments = {name: leaves[i] for name, leaves in trees.items()}
        if "key" in names:
            arguments["key"] = _tree.leaf_key(evidence["key"], paths[i])
        return score(weights[i], **arguments)

    return of_leaf
