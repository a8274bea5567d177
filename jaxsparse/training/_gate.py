"""The gate of `sparsify`: a gradient that is not finite changes nothing, at little cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxsparse import _tree

Tree = Any
T = TypeVar("T")


def all_finite(grads: Tree) -> jax.Array:
    """Whether every floating-point entry is finite."""
    finite = [jnp.array(True)]
    for g in jax.tree.leaves(grads):
        if _tree.is_float(g) and jnp.size(g):
            finite.append(_tree.in_auto_mode(_leaf_finite, jnp.asarray(g), replicated=True))
    # Sorted rather than reduced: a reduction would be fused into every pass that reads the result.
    return lax.sort(jnp.stack(finite))[0]


def _leaf_finite(g: jax.Array) -> jax.Array:
    def by_products(g: jax.Array) -> jax.Array:
        # The largest number times the smallest normal one is 4, so finite entries stay finite. XLA
        # on a CPU runs this at the speed of memory, and a reduction at a third of it.
        smallest = jnp.finfo(g.dtype).smallest_normal
        while g.ndim:
            g = g @ jnp.full(g.shape[-1], smallest, g.dtype)
        return jnp.isfinite(g)

    def by_reduction(g: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(g))

    if g.dtype not in (jnp.float32, jnp.float64):
        return by_reduction(g)
    return lax.platform_dependent(g, cpu=by_products, default=by_reduction)


def update_when(finite: jax.Array, fn: Callable[[T], tuple[Tree, T]], state: T) -> tuple[Tree, T]:
    """`fn(state)`, updates and the next state; where not finite the state as it was.

    The choice between old and new is made where each leaf of the state is computed, and what comes
    after in `fn` reads what was chosen: the compiler then writes every leaf once, in place. Chosen
    at the end instead, a leaf and what is derived from it keep both versions alive (1.4 to 1.7 of a
    step). A branch or a loop around `fn` must write out the updates, and runs for every member
    under vmap.

    Args:
        finite: bool scalar.
        fn: state -> (updates, next state).
        state: A tree; leaves of another dtype than in the next state are converted.

    Returns:
        The updates, which mean nothing where not finite, and the state.
    """
    closed, (updates, states) = jax.make_jaxpr(fn, return_shape=True)(state)
    jaxpr, first = closed.jaxpr, len(jax.tree.leaves(updates))
    inputs = jax.tree.leaves(state)
    olds = list(map(_tree.with_type_of, inputs, jax.tree.leaves(states)))
    born = {}  # variable -> index of the leaf of the state that it is, of several the first
    for i, v in enumerate(jaxpr.outvars[first:]):
        if not isinstance(v, Literal):
            born.setdefault(v, i)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))
    chosen = set()

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    def choose(new: Any, i: int) -> Any:
        chosen.add(i)
        return lax.select(finite, new, olds[i])

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(
                *map(read, eqn.invars), **eqn.primitive.get_bind_params(eqn.params)
            )
        out = out if eqn.primitive.multiple_results else [out]
        for v, x in zip(eqn.outvars, out, strict=True):
            values[v] = choose(x, born[v]) if v in born else x
    leaves = list(map(read, jaxpr.outvars))
    for i in set(range(len(olds))) - chosen:
        leaves[first + i] = choose(jnp.asarray(leaves[first + i]), i)
    return jax.tree.unflatten(jax.tree.structure((updates, states)), leaves)
