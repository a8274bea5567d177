"""The gate of `sparsify`: a gradient that is not finite changes nothing, at little cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxsparse import _tree, select

Tree = Any
T = TypeVar("T")


def all_finite(grads: Tree) -> jax.Array:
    """Whether every floating-point entry is finite: the largest exponent, by integer maxima."""
    finite = [jnp.array(True)]
    for g in jax.tree.leaves(grads):
        if _tree.is_float(g) and jnp.size(g):
            finite.append(_tree.in_auto_mode(_leaf_finite, jnp.asarray(g), replicated=True))
    # Sorted rather than reduced: a reduction would be fused into every pass that reads the result.
    return lax.sort(jnp.stack(finite))[0]


def _leaf_finite(g: jax.Array) -> jax.Array:
    info = jnp.finfo(g.dtype)
    integer = {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}.get(info.bits)
    if integer is None:  # eight-bit floats
        return jnp.all(jnp.isfinite(g.astype(jnp.float32)))
    infinity = lax.bitcast_convert_type(jnp.asarray(jnp.inf, g.dtype), integer)
    size = lax.bitcast_convert_type(g, integer) & jnp.iinfo(integer).max
    axis = max(range(g.ndim), key=lambda a: select.fold_step(g.shape[a]), default=None)
    size = size if axis is None else select.fold(size, axis, jnp.max)
    return jnp.max(size) < infinity


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
    gate = {}  # a variable that stands for several leaves is gated for the first
    for i, v in enumerate(jaxpr.outvars[first:]):
        if not isinstance(v, Literal):
            gate.setdefault(v, i)
    computed = {v for eqn in jaxpr.eqns for v in eqn.outvars}
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    def choose(new: Any, i: int) -> Any:
        return lax.select(finite, new, olds[i])

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(
                *map(read, eqn.invars), **eqn.primitive.get_bind_params(eqn.params)
            )
        out = out if eqn.primitive.multiple_results else [out]
        for v, x in zip(eqn.outvars, out, strict=True):
            values[v] = choose(x, gate[v]) if v in gate else x
    leaves = [read(v) for v in jaxpr.outvars]
    for i, v in enumerate(jaxpr.outvars[first:]):
        if v not in computed or gate[v] != i:
            leaves[first + i] = choose(leaves[first + i], i)
    return jax.tree.unflatten(jax.tree.structure((updates, states)), leaves)
