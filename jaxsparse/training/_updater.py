"""What an algorithm of sparse training is: a NamedTuple of pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr

from jaxsparse import _tree

Tree = Any
T = TypeVar("T")


def identity_view(params: Tree, state: Any) -> Tree:
    """The weights themselves."""
    del state
    return params


def kept_by_both(old: Any, new: Any) -> Tree:
    """Entries that are in the old masks and in the new."""
    return jax.tree.map(jnp.logical_and, old.masks, new.masks)


class MaskUpdater(NamedTuple):
    """An algorithm of sparse training, for `sparsify`.

    A state is a NamedTuple of arrays with a field `masks`, what the model sees. Where the loss is
    not computed with the weights as they are (straight-through estimators), the class of the state
    says `dense_weights = True`.

    Attributes:
        init: params -> state.
        update: (state, params, grads, **extra) -> state. `extra` holds the keyword arguments of
            `tx.update` and always `finite`, a bool: where it is False the state must stay as it is.
        view: (params, state) -> what the loss is computed with.
        kept: (old state, new state) -> masks of the entries whose value and moments survive the
            step.
        regularize: (params, state, grads, updates) -> (grads, updates), or None. Called before the
            inner optimizer, with updates None, and after it.
        after_step: Whether `update` sees the weights after the step rather than before, so that
            masks that follow the weights are never one step behind. `kept` then gets the old state
            twice.

    Example:
        >>> import jaxsparse as jsp
        >>> jsp.static(jsp.uniform(0.5), score=jsp.magnitude).after_step
        False
    """

    init: Callable[[Tree], Any]
    update: Callable[..., Any]
    view: Callable[[Tree, Any], Tree] = identity_view
    kept: Callable[[Any, Any], Tree] = kept_by_both
    regularize: Callable[..., tuple[Tree, Tree]] | None = None
    after_step: bool = False


def run_when(due: jax.Array, fn: Callable[[T], T], value: T) -> T:
    """`fn(value)` where due, else `value`: a loop of zero or one trips.

    Unlike `lax.cond` it stays a branch under vmap: no member pays for a step on which none is due.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(value)

    def body(state: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        due, value = state
        # Always due here, which the compiler cannot know: what only depends on the arrays that `fn`
        # captured would otherwise be moved out of the loop, and computed at every step.
        captured = [_tree.zero_unless(due, x) for x in closed.consts]
        leaves = eval_jaxpr(closed.jaxpr, captured, *jax.tree.leaves(value))
        return jnp.zeros_like(due), jax.tree.unflatten(jax.tree.structure(out), leaves)

    return lax.while_loop(lambda state: state[0], body, (due, value))[1]
