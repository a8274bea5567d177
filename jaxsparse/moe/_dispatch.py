"""Tokens to experts and back: one sort of integers, two gathers, and gathers backward.

The rows that experts see are sorted by expert, each token once for every choice in use. A gather of
rows would be differentiated into a scatter with additions; here each of the two gathers is the
transpose of the other, which the index arrays of both make a gather again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.moe._routing import Routing, counts


class Dispatch(NamedTuple):
    """Where each row comes from and goes to.

    Attributes:
        choice: int32 `[R]`: row r is for choice c = choice[r] of the T k ones, token c // k.
        row: int32 `[T, k]`: the row of each choice; R where it has none.
        sizes: int32 `[E]`: rows of each expert, in this order; rows past their sum are unused.

    Example:
        >>> from jaxsparse.moe import Routing, dispatch
        >>> experts = jnp.array([[1], [2], [0]])  # of two: the second token has none
        >>> dispatch(Routing(jnp.ones((3, 1)), experts, jnp.zeros(())), 2).row.ravel().tolist()
        [1, 3, 0]
    """

    choice: jax.Array
    row: jax.Array
    sizes: jax.Array


def dispatch(routing: Routing, experts: int, *, rows: int | None = None) -> Dispatch:
    """Sort the choices of a routing by expert.

    Args:
        routing: Of T tokens.
        experts: E.
        rows: R, room for the choices in use; T k if not given, which always suffices. With less
            the choices of the last experts that find no room are dropped.

    Example:
        >>> from jaxsparse.moe import Routing, dispatch
        >>> routing = Routing(jnp.ones((3, 1)), jnp.array([[1], [0], [1]]), jnp.zeros(()))
        >>> plan = dispatch(routing, 2)
        >>> plan.choice.tolist(), plan.sizes.tolist()
        ([1, 0, 2], [1, 2])

    Cost: one stable sort of T k integers.
    """
    t, k = routing.experts.shape
    room = t * k if rows is None else min(rows, t * k)
    sizes = counts(routing, experts)
    ends = jnp.minimum(jnp.cumsum(sizes), room)
    sizes = jnp.diff(ends, prepend=0)
    choice = jnp.argsort(routing.experts.ravel(), stable=True)[:room].astype(jnp.int32)
    place = jnp.full(t * k, room, jnp.int32).at[choice].set(jnp.arange(room, dtype=jnp.int32))
    row = jnp.where(place < ends[-1], place, room).reshape(t, k)
    return Dispatch(choice, row, sizes)


def spread(x: jax.Array, plan: Dispatch) -> jax.Array:
    """The rows [R, D] that experts see, of tokens x [T, D]; unused rows are any token's.

    Example:
        >>> from jaxsparse.moe import Routing, dispatch, spread
        >>> plan = dispatch(Routing(jnp.ones((2, 1)), jnp.array([[1], [0]]), jnp.zeros(())), 2)
        >>> spread(jnp.array([[5.0], [7.0]]), plan).ravel().tolist()
        [7.0, 5.0]
    """
    return _spread(x, plan.choice, plan.row)


def collect(y: jax.Array, plan: Dispatch) -> jax.Array:
    """What came of each choice, [T, k, N], from rows y [R, N]; zero where a choice has no row."""
    return _collect(y, plan.choice, plan.row)


def combine(y: jax.Array, plan: Dispatch, weights: jax.Array) -> jax.Array:
    """The sum over k of weights[t, k] y[row of choice k of t]: [R, N] -> [T, N], in float32.

    Example:
        >>> from jaxsparse.moe import Routing, combine, dispatch
        >>> plan = dispatch(Routing(jnp.ones((2, 1)), jnp.array([[1], [0]]), jnp.zeros(())), 2)
        >>> combine(jnp.array([[7.0], [5.0]]), plan, jnp.array([[1.0], [0.5]])).ravel().tolist()
        [5.0, 3.5]
    """
    picked = collect(y, plan)
    return jnp.einsum(
        "tk,tkn->tn", weights, picked.astype(weights.dtype), precision="highest"
    ).astype(y.dtype)


def apply_experts(
    x: jax.Array,
    routing: Routing,
    experts: int,
    run: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    rows: int | None = None,
) -> jax.Array:
    """The weighted sum of what the chosen experts make of each token; no token is dropped.

    Args:
        x: `[T, D]`.
        routing: Of T tokens.
        experts: E.
        run: (rows [R, D] sorted by expert, sizes int32 [E]) -> [R, N], such as a `grouped_ffn`.
        rows: See `dispatch`.

    Returns:
        `[T, N]`; zeros for a token that no expert sees.

    Example:
        >>> from jaxsparse.moe import Routing, apply_experts
        >>> from pallas_kernels import grouped_matmul
        >>> routing = Routing(jnp.ones((2, 1)), jnp.array([[1], [0]]), jnp.zeros(()))
        >>> w = jnp.array([[[2.0]], [[3.0]]])
        >>> run = lambda rows, sizes: grouped_matmul(rows, w, sizes)
        >>> apply_experts(jnp.ones((2, 1)), routing, 2, run).ravel().tolist()
        [3.0, 2.0]

    Cost: one sort of T k integers, 2 T k rows moved forward and 2 T k backward, and `run`.
    """
    plan = dispatch(routing, experts, rows=rows)
    return combine(run(spread(x, plan), plan.sizes), plan, routing.weights)


@jax.custom_vjp
def _spread(x: jax.Array, choice: jax.Array, row: jax.Array) -> jax.Array:
    return x[choice // row.shape[1]]


def _spread_forward(x, choice, row):
    return _spread(x, choice, row), (choice, row)


def _spread_backward(saved, drows):
    choice, row = saved
    return _collect(drows, choice, row).sum(1), None, None


@jax.custom_vjp
def _collect(y: jax.Array, choice: jax.Array, row: jax.Array) -> jax.Array:
    used = row < y.shape[0]
    return jnp.where(used[..., None], y[jnp.minimum(row, y.shape[0] - 1)], 0)


def _collect_forward(y, choice, row):
    return _collect(y, choice, row), (choice, row)


def _collect_backward(saved, dpicked):
    choice, row = saved
    # A row whose choice was dropped got nothing back.
    used = row.ravel()[choice] < choice.shape[0]
    flat = dpicked.reshape(-1, dpicked.shape[-1])
    return jnp.where(used[:, None], flat[choice], 0), None, None


_spread.defvjp(_spread_forward, _spread_backward)
_collect.defvjp(_collect_forward, _collect_backward)
