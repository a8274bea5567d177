"""Static masks: prune once before training and train what is left.

Random masks: Liu et al., The unreasonable effectiveness of random pruning, 2022, arXiv:2202.02643.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxsparse._choose import choose
from jaxsparse.plans import Plan
from jaxsparse.scores._evidence import ScoreFn, scorer
from jaxsparse.scores._random import random
from jaxsparse.training._updater import MaskUpdater

Tree = Any


class StaticState(NamedTuple):
    """State of `static` and `fixed`."""

    masks: Tree


def keep_state(state: Any, params: Tree, grads: Tree, **extra: Any) -> Any:
    """The state as it is."""
    del params, grads, extra
    return state


def static(
    distribution: Callable[[Tree], Plan],
    *,
    key: jax.Array | None = None,
    score: ScoreFn | None = None,
) -> MaskUpdater:
    """Masks chosen at initialisation and never moved: at random, or by a score of the weights.

    Args:
        distribution: Parameters -> `Plan`, e.g. `uniform(0.9)`.
        key: Random key: random masks.
        score: Score of a weight alone, e.g. `magnitude`. For scores that need gradients use
            `fixed(prune(params, distribution, snip, grad=grads)[1])`.

    Returns:
        A `MaskUpdater`.

    Raises:
        ValueError: Unless exactly one of `key` and `score` is given.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> tx = jsp.sparsify(optax.adam(1e-3), jsp.static(jsp.erk(0.5), key=jax.random.key(0)))
        >>> int(jsp.masks(tx.init({"w": jnp.ones((4, 4))}))["w"].sum())
        8

    Cost: nothing per step beyond the masks.

    References: Liu et al., The unreasonable effectiveness of random pruning, 2022,
    arXiv:2202.02643.
    """
    if (key is None) == (score is None):
        raise ValueError(
            "static needs either key= for random masks or score= for masks by a score of the "
            "weights, such as score=jsp.magnitude; got "
            f"{'neither' if key is None else 'both'}."
        )

    def init(params: Tree) -> StaticState:
        score_of = scorer(random if score is None else score, params, {"key": key})
        return StaticState(choose(distribution, params, score_of))

    return MaskUpdater(init, keep_state)
