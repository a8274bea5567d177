"""Losses, statistics and capacity of routings, and the rules of the routers, by hand or numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

import jaxsparse as jsp
from jaxsparse import moe

T, E = 64, 8


def logits(seed=0, t=T, e=E):
    return jax.random.normal(jax.random.key(seed), (t, e))


def test_balance_loss_by_hand():
    p = jnp.array([[0.5, 0.5], [0.9, 0.1]])
    experts = jnp.array([[0], [0]])
    assert float(moe.balance_loss(p, experts)) == pytest.approx(2 * 0.7)
    slope = jax.grad(lambda p: moe.balance_loss(p, experts))(p)
    np.testing.assert_allclose(slope, [[1, 0], [1, 0]])  # only the loaded expert is pushed down


def test_unused_choices_count_in_no_load():
    p = jnp.full((2, 2), 0.5)
    assert float(moe.balance_loss(p, jnp.array([[0, 2], [1, 2]]))) == pytest.approx(1)


def test_z_loss_by_hand():
    assert float(moe.z_loss(jnp.array([[1.0, 1.0]]))) == pytest.approx((1 + np.log(2)) ** 2)


def test_statistics_by_hand():
    experts = jnp.array([[0, 1], [0, 3], [3, 3], [1, 0]])
    seen = moe.statistics(moe.Routing(jnp.ones((4, 2)), experts, jnp.zeros(())), 3)
    np.testing.assert_allclose(seen.load, [3 / 5, 2 / 5, 0])
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4)) / np.log(3)
    assert float(seen.entropy) == pytest.approx(entropy)
    assert float(seen.dropped) == 0.25 and float(seen.choices) == 1.25


@pytest.mark.parametrize("normalize", [True, False])
def test_token_choice_is_the_top_of_the_softmax(normalize):
    x = logits()
    routing = moe.token_choice(2, normalize=normalize).route(x, ())
    p = np.asarray(jax.nn.softmax(x))
    want = np.argsort(-p, 1)[:, :2]
    np.testing.assert_array_equal(routing.experts, want)
    weights = np.take_along_axis(p, want, 1)
    weights = weights / weights.sum(1, keepdims=True) if normalize else weights
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-6)
    aux = 1e-2 * moe.balance_loss(jnp.asarray(p), jnp.asarray(want)) + 1e-3 * moe.z_loss(x)
    assert float(routing.aux) == pytest.approx(float(aux))


def test_expert_dropout_leaves_experts_out_for_every_token(key):
    routing = moe.token_choice(2, dropout=0.5).route(logits(), (), key=key)
    assert len(np.unique(routing.experts)) <= 4
    assert len(np.unique(moe.token_choice(2, dropout=0.5).route(logits(), ()).experts)) == E


def test_jitter_needs_a_key_and_changes_choices(key):
    router, x = moe.token_choice(2, jitter=0.5), logits()
    np.testing.assert_array_equal(
        router.route(x, ()).experts, moe.token_choice(2).route(x, ()).experts
    )
    assert np.any(np.asarray(router.route(x, (), key=key).experts) != router.route(x, ()).experts)


def test_loss_free_balances_what_is_skewed_and_keeps_weights_out_of_the_bias():
    router = moe.loss_free(2, rate=0.004)
    x = logits(t=512) + jnp.linspace(0, 3, E)
    state = router.init(E)

    @jax.jit
    def step(state):
        routing = router.route(x, state)
        return router.update(state, moe.statistics(routing, E)), routing

    first = moe.statistics(step(state)[1], E).load
    for _ in range(400):
        state, routing = step(state)
    last = moe.statistics(routing, E).load
    assert first.max() > 0.3 and last.max() < 0.15  # even is 0.125
    scores = jnp.take_along_axis(jax.nn.sigmoid(x), routing.experts, 1)
    np.testing.assert_allclose(routing.weights, scores / scores.sum(1, keepdims=True), rtol=1e-6)
    assert not np.any(jax.grad(lambda s: router.route(x, s).weights.sum())(state))


@examples(st.floats(0.05, 1.0), st.integers(0, 5))
def test_top_p_takes_the_fewest_experts_that_reach_p(p, seed):
    x = logits(seed, 8)
    routing = moe.top_p(p, E).route(x, ())
    probabilities = np.asarray(jax.nn.softmax(x))
    for row, weights, experts in zip(probabilities, routing.weights, routing.experts, strict=True):
        used = np.asarray(experts) < E
        n = int(used.sum())
        assert n >= 1 and not np.any(np.asarray(weights)[~used])
        top = np.sort(row)[::-1]
        assert top[:n].sum() >= p - 1e-5 and (n == 1 or top[: n - 1].sum() < p + 1e-5)


def test_expert_choice_is_even_and_threshold_choice_comes_to_be():
    x = logits(t=512) + jnp.linspace(0, 3, E)
    even = moe.expert_choice(2.0).route(x, ())
    np.testing.assert_array_equal(moe.counts(even, E), np.full(E, 128))
    p = np.asarray(jax.nn.softmax(x))
    taken = np.asarray(even.experts == 3).any(1)
    assert p[taken, 3].min() >= p[~taken, 3].max()  # the best tokens of the expert
    router = moe.threshold_choice(2.0, rate=0.05)
    state = router.init(E)
    step = jax.jit(lambda s: router.update(s, moe.statistics(router.route(x, s), E)))
    for _ in range(200):
        state = step(state)
    np.testing.assert_allclose(moe.counts(router.route(x, state), E), np.full(E, 128), atol=16)


def test_threshold_choice_is_causal_and_expert_choice_is_not():
    x, later = logits(), logits(1)
    mixed = jnp.concatenate([x[: T // 2], later[T // 2 :]])
    causal, state = moe.threshold_choice(2.0), moe.threshold_choice(2.0).init(E)
    half = slice(None, T // 2)
    np.testing.assert_array_equal(
        causal.route(x, state).experts[half], causal.route(mixed, state).experts[half]
    )
    looks = moe.expert_choice(2.0)
    assert np.any(looks.route(x, ()).experts[half] != looks.route(mixed, ()).experts[half])


def test_relu_router_by_hand():
    routing = moe.relu_router(2).route(jnp.array([[3.0, -1.0, 4.0], [-1.0, -1.0, -1.0]]), ())
    rms = np.sqrt(25 / 3)
    np.testing.assert_allclose(routing.weights, [[4 / rms, 3 / rms], [0, 0]], rtol=1e-5)
    np.testing.assert_array_equal(routing.experts, [[2, 0], [3, 3]])  # nothing positive: no expert
    slope = jax.grad(lambda x: moe.relu_router(2).route(x, ()).weights.sum())(jnp.zeros((1, 3)))
    assert np.isfinite(slope).all()


def test_locality_and_chunk_losses_fall_as_neighbours_agree():
    same = jnp.tile(jnp.array([[1.0, -1.0]]), (8, 1))
    other = same.at[::2].multiply(-1)
    assert moe.locality_loss(same) < 1e-6 < 10 < moe.locality_loss(other)
    alike, mixed = jax.nn.relu(same), jax.nn.relu(other)
    assert float(moe.chunk_loss(alike, 4)) == 0.5 and float(moe.chunk_loss(mixed, 4)) == 1.0
    router = moe.relu_router(2, locality=1.0, chunk_sparsity=1.0, chunk=4, length=8)
    two = jnp.concatenate([same, -same])  # a border between sequences is no change within one
    assert float(router.route(two, ()).aux) == pytest.approx(0.5, abs=1e-3)


def test_hashed_depends_on_the_token_alone_and_spreads():
    tokens = jnp.arange(4000) % 2000
    routing = moe.hashed(2).route(jnp.zeros((4000, E)), (), tokens=tokens)
    np.testing.assert_array_equal(routing.experts[:2000], routing.experts[2000:])
    assert np.all(routing.experts[:, 0] != routing.experts[:, 1])
    assert moe.statistics(routing, E).load.max() < 1.2 / E
    other = moe.hashed(2, seed=1).route(jnp.zeros((4000, E)), (), tokens=tokens)
    assert np.mean(np.asarray(other.experts[:, 0] == routing.experts[:, 0])) < 0.3


def test_random_experts_differ_and_spread(key):
    routing = moe.random(3).route(jnp.zeros((2000, E)), (), key=key)
    assert all(len(set(row)) == 3 for row in np.asarray(routing.experts).tolist())
    assert moe.statistics(routing, E).load.max() < 1.2 / E


@pytest.mark.parametrize("by_weight", [True, False])
def test_capacity_against_a_loop(by_weight):
    routing = moe.token_choice(2).route(logits() + jnp.linspace(0, 2, E), ())
    got = moe.limited(routing, E, 10, by_weight=by_weight)
    weights, experts = np.asarray(routing.weights), np.asarray(routing.experts)
    slots = [(k, t) for k in range(2) for t in range(T)]
    if by_weight:
        slots.sort(key=lambda s: -weights[s[1], s[0]])
    room, want = dict.fromkeys(range(E), 10), np.full((T, 2), E)
    for k, t in slots:
        e = experts[t, k]
        if room[e]:
            room[e] -= 1
            want[t, k] = e
    np.testing.assert_array_equal(got.experts, want)
    np.testing.assert_array_equal(got.weights, np.where(want < E, weights, 0))
    assert 0 < float(moe.statistics(got, E).dropped) < 1


def test_no_room_at_all_and_all_to_one_expert():
    routing = moe.Routing(jnp.ones((T, 1)), jnp.zeros((T, 1), jnp.int32), jnp.zeros(()))
    assert not np.any(moe.limited(routing, E, 0).experts != E)
    kept = moe.limited(routing, E, 5, by_weight=False)
    np.testing.assert_array_equal(kept.experts[:5], 0)
    np.testing.assert_array_equal(kept.experts[5:], E)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe.token_choice(9).route(logits(), ()), "k=9 of 8 experts"),
        (lambda: moe.token_choice(0).route(logits(), ()), "1 <= k"),
        (lambda: moe.token_choice(1, jitter=1.5), "jitter is a share"),
        (lambda: moe.top_p(1.5, 2), "0 < p <= 1"),
        (lambda: moe.expert_choice(-1.0), "factor > 0"),
        (lambda: moe.hashed().route(logits(), ()), "needs tokens="),
        (lambda: moe.random().route(logits(), ()), "needs key="),
        (lambda: moe.given().route(logits(), ()), "needs given="),
        (lambda: moe.limited(moe.token_choice(1).route(logits(), ()), E, -1), "at least 0"),
        (lambda: moe.chunk_loss(jnp.ones((5, 2)), 2), "must divide the 5"),
        (lambda: moe.task_gate(2).logits({}, jnp.ones((3, 2)), jnp.ones((1, 2, 2))), "needs task="),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gates_by_brute_force():
    x, up = (
        jax.random.normal(jax.random.key(0), (5, 6)),
        jax.random.normal(jax.random.key(1), (3, 6, 400)),
    )
    mean = moe.mean_key_gate().logits({}, x, up)
    np.testing.assert_allclose(mean, jnp.einsum("td,edh->teh", x, up).mean(-1), atol=1e-5)
    # The Gaussian estimate is close to the share of positive hidden units.
    share = (jnp.einsum("td,edh->teh", x, up + 0.3) > 0).mean(-1)
    said = -moe.sparsity_gate(1.0).logits({}, x, up + 0.3)
    np.testing.assert_allclose(said, share, atol=0.08)
    gate = moe.task_gate(2)
    weights = gate.init(jax.random.key(2), 6, 3)
    task = jnp.array([0, 1, 1, 0, 1])
    np.testing.assert_allclose(
        gate.logits(weights, x, up, task=task),
        x @ weights["kernel"] + weights["task"][task],
        atol=1e-5,
    )


def test_a_nan_logit_reaches_the_loss():
    routing = moe.token_choice(2).route(logits().at[0, 0].set(jnp.nan), ())
    assert np.isnan(routing.aux)  # so that apply_if_finite and the like see it
    assert np.all(np.asarray(routing.experts) < E)
    assert jsp.moe is moe
