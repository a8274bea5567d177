"""Tokens to experts and back, against a loop over tokens; and the layer of experts."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsparse as jsp
from jaxsparse import moe
from pallas_kernels import grouped_matmul

T, E, D, N = 24, 4, 6, 5


def dense(x, routing, w):
    """Every expert for every token, then the chosen ones: no dispatch at all."""
    every = jnp.einsum("td,edn->ten", x, w)
    chosen = routing.experts[..., None] == jnp.arange(E)
    return jnp.einsum("tk,tke,ten->tn", routing.weights, chosen.astype(jnp.float32), every)


def problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (T, D)),
        jax.random.normal(keys[1], (T, E)),
        jax.random.normal(keys[2], (E, D, N)),
    )


def sparse(x, routing, w, rows=None):
    run = lambda rows_, sizes: grouped_matmul(rows_, w, sizes)  # noqa: E731
    return moe.apply_experts(x, routing, E, run, rows=rows)


ROUTINGS = {
    "two each": lambda logits: moe.token_choice(2).route(logits, ()),
    "some": lambda logits: moe.top_p(0.6, 3).route(logits, ()),
    "expert choice": lambda logits: moe.expert_choice(1.5).route(logits, ()),
    "capacity": lambda logits: moe.limited(moe.token_choice(2).route(logits, ()), E, 5),
    "all to one": lambda logits: moe.given().route(logits, (), given=jnp.full(T, 2)),
    "nobody": lambda logits: moe.given().route(logits, (), given=jnp.full(T, E)),
}


def padded(routing):
    """The same with room for E choices, so that all routings share one compiled program."""
    spare = ((0, 0), (0, E - routing.experts.shape[1]))
    return routing._replace(
        weights=jnp.pad(routing.weights, spare),
        experts=jnp.pad(routing.experts, spare, constant_values=E),
    )


def results(apply):
    """Output and gradients of x, the routing's weights and w."""

    def loss(x, weights, w, routing):
        y = apply(x, routing._replace(weights=weights), w)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


SPARSE, DENSE = results(sparse), results(dense)


@pytest.mark.parametrize("name", ROUTINGS)
def test_output_and_gradients_against_every_expert(name):
    x, logits, w = problem()
    routing = padded(ROUTINGS[name](logits))
    got, want = (run(x, routing.weights, w, routing) for run in (SPARSE, DENSE))
    used = routing.experts < E
    assert not np.any(jnp.where(used, 0, got[1][1]))  # an unused choice has no gradient
    chex.assert_trees_all_close(got, want, atol=2e-5)


def test_fewer_rows_than_choices_suffice_when_few_are_used():
    x, logits, w = problem()
    routing = moe.expert_choice(1.0).route(logits, ())
    few = jax.jit(partial(sparse, rows=T))(x, routing, w)
    np.testing.assert_allclose(few, dense(x, routing, w), atol=1e-5)


def test_what_finds_no_room_is_dropped_and_gives_no_gradient():
    x, logits, w = problem()
    routing = moe.token_choice(1).route(logits, ())
    plan = moe.dispatch(routing, E, rows=10)
    assert int(plan.sizes.sum()) == 10
    kept = routing._replace(experts=jnp.where(plan.row < 10, routing.experts, E))
    got = results(partial(sparse, rows=10))(x, routing.weights, w, routing)
    want = results(dense)(x, kept.weights, w, kept)
    chex.assert_trees_all_close(got, want, atol=2e-5)


def test_a_new_routing_never_recompiles_and_vmap_maps():
    x, logits, w = problem()
    run = jax.jit(chex.assert_max_traces(n=1)(lambda x, g: sparse(x, ROUTINGS["two each"](g), w)))
    stack = jnp.stack([logits, -logits])
    outs = jnp.stack([run(x, g) for g in stack])
    mapped = jax.jit(jax.vmap(lambda g: sparse(x, ROUTINGS["two each"](g), w)))(stack)
    np.testing.assert_allclose(mapped, outs, atol=1e-5)


def layer(router, **options):
    return jsp.nn.MoE(D, 8, E, router, rngs=nnx.Rngs(0), **options)


def test_the_layer_is_the_sum_of_its_experts():
    moe_layer = layer(moe.token_choice(2), shared=4)
    x = problem()[0].reshape(2, 12, D)
    y, routed = nnx.jit(lambda layer, x: layer(x))(moe_layer, x)

    def mlp(x, gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    flat = x.reshape(-1, D)
    want = mlp(
        flat, *(w[...] for w in (moe_layer.shared_gate, moe_layer.shared_up, moe_layer.shared_down))
    )
    weights = [moe_layer.gate[...], moe_layer.up[...], moe_layer.down[...]]
    for t in range(T):
        for weight, e in zip(routed.routing.weights[t], routed.routing.experts[t], strict=True):
            want = want.at[t].add(weight * mlp(flat[t], *(w[e] for w in weights)))
    np.testing.assert_allclose(y.reshape(-1, D), want, atol=1e-5)


def test_a_trained_layer_with_sparse_experts_stays_sparse_in_every_expert():
    import optax

    graph, params, rest = nnx.split(layer(moe.token_choice(2)), nnx.Param, ...)
    tx = jsp.sparsify(
        optax.adam(1e-2),
        jsp.set_(
            jsp.uniform(0.5, where=lambda path, w: "gate" in path or "up" in path),
            key=jax.random.key(0),
            when=jsp.every(2),
        ),
    )
    state, x = tx.init(params), problem()[0]

    def loss(params):
        y, routed = nnx.merge(graph, params, rest)(x)
        return jnp.mean((y - x) ** 2) + routed.aux

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    up = np.asarray(params["up"].get_value())
    np.testing.assert_array_equal((up != 0).sum((1, 2)), up[0].size // 2)  # of each expert alike


def test_router_state_moves_by_the_statistics_alone():
    moe_layer = layer(moe.loss_free(1, rate=0.1))
    x = jnp.ones((3, D))
    routing = moe_layer.route(x)
    seen = moe.statistics(routing, E)
    before = moe_layer.state.get_value()
    after = moe_layer.next_state(seen)
    busy = int(routing.experts[0, 0])
    assert not np.any(before) and after[busy] < 0 < after[(busy + 1) % E]


def test_bfloat16_and_capacity():
    moe_layer = layer(moe.token_choice(2), capacity_factor=0.5)
    y, routed = nnx.jit(lambda layer, x: layer(x))(moe_layer, problem()[0].astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and routed.aux.dtype == jnp.float32
    assert moe.counts(routed.routing, E).max() <= 6


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="experts >= 1"):
        jsp.nn.MoE(4, 4, 0, moe.token_choice(1), rngs=nnx.Rngs(0))
