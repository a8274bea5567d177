"""From dense weights to stored blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxsparse.formats._block_sparse import BlockSparse, best_rows
from jaxsparse.patterns import Block
from jaxsparse.plans import Plan
from jaxsparse.scores._evidence import ScoreFn, scorer
from jaxsparse.scores._magnitude import magnitude

Tree = Any


def blockify(
    params: Tree,
    distribution: Callable[[Tree], Plan],
    score: ScoreFn = magnitude,
    *,
    density: float | None = None,
    **evidence: Any,
) -> tuple[Tree, Tree]:
    """Store planned weights as blocks: the best `density * K/bk` of every block column.

    The same number in every column (constant fan-in, at block level) gives every device of a mesh
    the same work. Train the result with `block_static`, `block_set` or another updater of stored
    blocks; its `view` gives weights for `x @ w`.

    Args:
        params: Parameters, any pytree of dense weights.
        distribution: Parameters -> `Plan`, whose pruned leaves have the pattern `Block`, e.g.
            `uniform(0.9, Block((64, 64)))`.
        score: Leaf -> scores of weights; a block scores their sum.
        density: Share of the blocks to store of every planned leaf, in (0, 1], if not what is
            planned: how dense `block_gradual` begins.
        **evidence: What the score asks for, as in `prune`.

    Returns:
        Two trees in the structure of the parameters. In the first a planned leaf `[..., K, N]` is
        its values `[..., S, bk, bn]`, in the second its `Topology`; leaves that stay dense are as
        they were, and `True`.

    Raises:
        ValueError: If a planned leaf has another pattern, or blocks do not fit; names the leaf. If
            the densities depend on the scores.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params = {"up": jnp.arange(16.0).reshape(4, 4), "bias": jnp.zeros(4)}
        >>> values, blocks = jsp.blockify(params, jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> values["up"].shape, blocks["up"].rows.tolist(), blocks["bias"]
        ((2, 2, 2), [1, 1], True)

    Cost: one selection a leaf.
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density is the share of blocks to store, in (0, 1]; got {density}.")
    plan = distribution(params)
    if getattr(distribution, "allocate", None) is not None:
        raise ValueError(
            "blockify needs to know from shapes how many blocks a leaf stores; global_ and lamp "
            "follow the scores. Use uniform or erk."
        )
    score_of = scorer(score, params, evidence)
    leaves, treedef = jax.tree.flatten(params)
    values, topologies = [], []
    for i, (w, leaf, path) in enumerate(zip(leaves, plan.leaves, plan.paths, strict=True)):
        if not leaf.sparsity:
            values.append(w)
            topologies.append(True)
            continue
        if not isinstance(leaf.pattern, Block):
            raise ValueError(
                f"{path} is planned with {leaf.pattern}, which cannot be stored as blocks. Plan it "
                "with Block((bk, bn)), or exclude it with where=."
            )
        share = leaf.density if density is None else density
        rows = best_rows(leaf.pattern.gather(score_of(i)), share)
        stored = BlockSparse.from_rows(w, leaf.pattern.shape, rows)
        values.append(stored.values)
        topologies.append(stored.topology)
    return treedef.unflatten(values), treedef.unflatten(topologies)
