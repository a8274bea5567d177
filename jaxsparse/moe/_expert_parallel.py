"""Experts on several devices: each holds E / n of them, inside `jax.shard_map` over one mesh axis.

Both functions give what `apply_experts` gives on one device, forward and backward, whatever the
loads: no token is dropped unless the stated room runs out.

`exchanged` sends rows to the devices of their experts and results back, by ragged all-to-all: k T D
values from each device each way. `gathered` gives every device all tokens and sums the results:
n T D values to each device each way; for few devices or few tokens. In both the work of a device
follows the load of its experts.

References: Gale et al., MegaBlocks, 2022, arXiv:2211.15841; Lepikhin et al., GShard, 2020,
arXiv:2006.16668.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.moe._dispatch import apply_experts, combine, dispatch, spread
from jaxsparse.moe._routing import Routing
from pallas_kernels._compat import has_ragged_all_to_all
from pallas_kernels._op import vary_alike

Run = Callable[[jax.Array, jax.Array], jax.Array]


def gathered(
    x: jax.Array,
    routing: Routing,
    experts: int,
    run: Run,
    *,
    axis: str,
    rows: int | None = None,
) -> jax.Array:
    """`apply_experts` with experts shared out over a mesh axis, by gathering all tokens.

    Args:
        x: `[T, D]`, the tokens of this device.
        routing: Of these tokens, over all E experts.
        experts: E, of all devices; the i-th device of the axis has those from i E / n on.
        run: (rows [R, D] sorted by expert, sizes [E / n]) -> [R, N], with the experts of this
            device.
        axis: Name of the mesh axis.
        rows: R, room for choices that fall on this device; n T k if not given, which always
            suffices. With less, choices of its last experts that find no room are dropped.

    Returns:
        `[T, N]`, for the tokens of this device.

    Raises:
        ValueError: If the experts do not divide among the devices.

    Example:
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> import jaxsparse as jsp
        >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
        >>> def layer(x, logits):
        ...     routing = jsp.moe.token_choice(1).route(logits, ())
        ...     return jsp.moe.gathered(x, routing, 2, lambda rows, sizes: rows, axis="expert")
        >>> layer = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        >>> layer(jnp.ones((3, 2)), jnp.zeros((3, 2))).shape
        (3, 2)

    Cost: moves n T D values to each device and n T N back; memory for n T k rows unless bounded.

    References: Lepikhin et al., GShard, 2020, arXiv:2006.16668.
    """
    here, first = _share(experts, axis)
    everywhere = lax.all_gather(x, axis, tiled=True)
    weights, chosen = (
        lax.all_gather(a, axis, tiled=True) for a in (routing.weights, routing.experts)
    )
    mine = (chosen >= first) & (chosen < first + here)
    local = Routing(weights, jnp.where(mine, chosen - first, here), routing.aux)
    y = apply_experts(everywhere, local, here, run, rows=rows)
    return lax.psum_scatter(y, axis, tiled=True)


def exchanged(
    x: jax.Array,
    routing: Routing,
    experts: int,
    run: Run,
    *,
    axis: str,
    rows: int | None = None,
) -> jax.Array:
    """`apply_experts` with experts shared out over a mesh axis, by ragged all-to-all.

    Args:
        x: `[T, D]`, the tokens of this device.
        routing: Of these tokens, over all E experts.
        experts: E, of all devices; the i-th device of the axis has those from i E / n on.
        run: (rows [R, D] sorted by expert, sizes [E / n]) -> [R, N], with the experts of this
            device.
        axis: Name of the mesh axis.
        rows: R, room for rows that this device receives; n T k if not given, which always suffices.
            With less, what devices late on the axis send beyond it is dropped, their last experts
            first, and those choices contribute zero.

    Returns:
        `[T, N]`, for the tokens of this device.

    Raises:
        ValueError: If the experts do not divide among the devices.

    Example:
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> import jaxsparse as jsp
        >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
        >>> def layer(x, logits):
        ...     routing = jsp.moe.token_choice(1).route(logits, ())
        ...     return jsp.moe.exchanged(x, routing, 2, lambda rows, sizes: rows, axis="expert")
        >>> layer = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        >>> layer(jnp.ones((3, 2)), jnp.zeros((3, 2))).shape
        (3, 2)

    Cost: two sorts of integers; moves up to T k D values from each device and T k N back; memory
    for R rows. XLA on a CPU has no ragged all-to-all: there all rows are gathered, for tests.

    References: Gale et al., MegaBlocks, 2022, arXiv:2211.15841.
    """
    here, first = _share(experts, axis)
    t, k = routing.experts.shape
    room = lax.axis_size(axis) * t * k if rows is None else rows
    plan = dispatch(routing, experts)
    there, back, sizes = _routes(plan.sizes, here, axis, room)
    sent: jax.Array = _exchange(spread(x, plan), there, back, room, axis)
    # Rows come by device and expert; now all rows of one expert together.
    ends = jnp.cumsum(sizes.ravel())
    at = jnp.searchsorted(ends, jnp.arange(room), side="right")
    expert = jnp.where(at < ends.shape[0], at % here, here).astype(jnp.int32)
    ones = jnp.ones((room, 1), jnp.float32)
    sort = dispatch(Routing(ones, expert[:, None], jnp.zeros(())), here)
    y = combine(run(spread(sent, sort), sort.sizes), sort, ones)
    returned: jax.Array = _exchange(y, back, there, t * k, axis)
    return combine(returned, plan, routing.weights)


class _Route(NamedTuple):
    """Where the rows of this device go: four int32 [n], one for each device, as JAX names them."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def _share(experts: int, axis: str) -> tuple[int, jax.Array]:
    """How many experts each device has, and the first of this one."""
    devices = lax.axis_size(axis)
    if experts % devices:
        raise ValueError(
            f"{experts} experts do not divide among the {devices} devices of axis {axis!r}; choose "
            "a multiple of them."
        )
    return experts // devices, lax.axis_index(axis) * (experts // devices)


def _routes(sizes: jax.Array, here: int, axis: str, room: int) -> tuple[_Route, _Route, jax.Array]:
    """The way of rows sorted by expert, the way back, and int32 [n, E / n]: rows that come."""
    me = lax.axis_index(axis)
    every = lax.all_gather(sizes, axis).reshape(-1, lax.axis_size(axis), here)  # from, to, expert
    begin = jnp.cumsum(every.sum(2), 1) - every.sum(2)  # where the rows for a device begin
    # At the receiver rows lie by sender and expert; what lies beyond its room is dropped.
    ends = jnp.minimum(jnp.cumsum(every.swapaxes(0, 1).reshape(every.shape[0], -1), 1), room)
    kept = jnp.diff(ends, prepend=0, axis=1).reshape(every.shape[0], -1, here).swapaxes(0, 1)
    count = kept.sum(2)  # from, to
    arrive = jnp.cumsum(count, 0) - count
    there = _Route(begin[me], count[me], arrive[me], count[:, me])
    back = _Route(arrive[:, me], count[:, me], begin[:, me], count[me])
    return there, back, kept[:, me]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _exchange(rows: jax.Array, there: _Route, back: _Route, room: int, axis: str) -> jax.Array:
    """[R, D] -> [room, D]: rows of all devices that were sent here; zero where none was."""
    if has_ragged_all_to_all():
        empty, _ = vary_alike(jnp.zeros((room, rows.shape[1]), rows.dtype), rows)
        return lax.ragged_all_to_all(rows, empty, *there, axis_name=axis)
    every = lax.all_gather(rows, axis)
    place = jnp.arange(room)
    sender = jnp.searchsorted(back.input_offsets, place, side="right") - 1
    within = place - back.input_offsets[sender]
    index = jnp.clip(back.output_offsets[sender] + within, 0, rows.shape[0] - 1)
    came = within < there.recv_sizes[sender]
    return jnp.where(came[:, None], every[sender, index], 0)


def _exchange_forward(rows, there, back, room, axis):
    return _exchange(rows, there, back, room, axis), (there, back, rows[:, :0])


def _exchange_backward(room, axis, saved, drows):
    there, back, like = saved
    return _exchange(drows, back, there, like.shape[0], axis), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)
