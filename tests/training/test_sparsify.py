"""What `sparsify` hands to whom, alone and inside other transformations."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.conformance.lists import make_params

HALF = jsp.uniform(0.5)
YES_NO = jnp.array([[True, False, True, False]])
PARAMS = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b": jnp.array([5.0])}
GRADS = {"w": jnp.array([[0.5, 1.0, 1.5, 2.0]]), "b": jnp.array([1.0])}
MASKS = {"w": YES_NO, "b": jnp.array(True)}


class SpyState(NamedTuple):
    masks: Any
    grads: Any
    params: Any
    value: Any


def spy_updater(dense=MASKS):
    """An updater of a user: fixed masks, and a note of what it was given."""

    def init(params):
        return SpyState(dense, params, params, jnp.zeros(()))

    def update(state, params, grads, *, finite, value=0.0, **extra):
        assert finite.dtype == bool and finite.shape == ()
        return SpyState(state.masks, grads, params, jnp.asarray(value, jnp.float32))

    return jsp.MaskUpdater(init, update)


def spy_inner():
    """An inner optimizer that notes what it was given; its update is minus the gradient."""

    def init(params):
        return {"seen": params, "value": jnp.zeros(())}

    def update(grads, state, params=None, *, value=0.0, **extra):
        seen = {"grads": grads, "params": params}
        del state
        return jax.tree.map(jnp.negative, grads), {
            "seen": seen["params"],
            "value": jnp.asarray(value, jnp.float32),
        }

    return optax.GradientTransformationExtraArgs(init, update)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_updater_sees_dense_gradients_and_the_inner_optimizer_masked_ones():
    tx = jsp.sparsify(spy_inner(), spy_updater())
    state = tx.init(PARAMS)
    same(state.inner["seen"], {"w": [[1.0, 0, 3, 0]], "b": [5.0]})
    updates, state = tx.update(GRADS, state, PARAMS)
    same((state.updater.grads, state.updater.params), (GRADS, PARAMS))
    same(state.inner["seen"], {"w": [[1.0, 0, 3, 0]], "b": [5.0]})
    same(updates, {"w": [[-0.5, -2, -1.5, -4]], "b": [-1.0]})
    same(optax.apply_updates(PARAMS, updates), {"w": [[0.5, 0, 1.5, 0]], "b": [4.0]})


@pytest.mark.parametrize("packed", [False, True])
def test_extra_arguments_reach_both(packed):
    tx = jsp.sparsify(spy_inner(), spy_updater(), packed=packed)
    _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, value=7.0, another=PARAMS)
    assert state.updater.value == 7 and state.inner["value"] == 7


def test_optimizers_without_extra_arguments_are_spared_them():
    tx = jsp.sparsify(optax.adam(1e-2), spy_updater())
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=7.0)
    assert state.updater.value == 7


def test_a_score_with_evidence_gets_it_from_update():
    gmp = jsp.gradual(HALF, schedule=jsp.constant(), when=jsp.every(1), score=jsp.fisher)
    tx = jsp.sparsify(optax.sgd(0.0), gmp)
    fisher = {"w": jnp.array([[100.0, 0, 0, 100]]), "b": jnp.zeros(1)}
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, fisher=fisher)
    assert jsp.masks(state)["w"].tolist() == [[True, False, False, True]]
    by_gradient = jsp.gradual(HALF, schedule=jsp.constant(), when=jsp.once(0), score=jsp.movement)
    tx = jsp.sparsify(optax.sgd(0.0), by_gradient)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert jsp.masks(state)["w"].tolist() == [[True, True, False, False]]


def test_gradient_accumulation_shows_the_updater_the_mean_dense_gradient():
    tx = optax.MultiSteps(jsp.sparsify(optax.sgd(1.0), spy_updater()), 2)
    state, params = tx.init(PARAMS), PARAMS
    for scale in (1.0, 3.0):
        updates, state = tx.update(jax.tree.map(lambda g, s=scale: s * g, GRADS), state, params)
        params = optax.apply_updates(params, updates)
    same(state.inner_opt_state.updater.grads, jax.tree.map(lambda g: 2.0 * g, GRADS))
    same(params, {"w": [[0.0, 0, 0, 0]], "b": [3.0]})
    jsp.check(params, state)


def test_masks_are_found_wherever_sparsify_stands():
    sparse = jsp.sparsify(optax.adam(1e-2), jsp.fixed(MASKS), packed=True)
    labels = {"w": "sparse", "b": "dense"}
    wrappers = [
        sparse,
        optax.chain(optax.identity(), sparse),
        optax.MultiSteps(sparse, 2),
        optax.apply_if_finite(sparse, 3),
        optax.inject_hyperparams(lambda rate: jsp.sparsify(optax.sgd(rate), jsp.fixed(MASKS)))(0.1),
        optax.multi_transform({"sparse": sparse, "dense": optax.sgd(0.1)}, labels),
        optax.masked(sparse, {"w": True, "b": False}),
        optax.lookahead(sparse, 5, 0.5),
    ]
    for tx in wrappers:
        params = optax.LookaheadParams.init_synced(PARAMS) if tx is wrappers[-1] else PARAMS
        state = tx.init(params)
        same(jsp.masks(state), MASKS)


def test_two_sparsify_share_a_tree():
    tx = optax.multi_transform(
        {
            "a": jsp.sparsify(optax.adam(1e-2), jsp.static(jsp.uniform(0.5), score=jsp.magnitude)),
            "b": jsp.sparsify(optax.sgd(0.1), jsp.static(jsp.uniform(0.75), score=jsp.magnitude)),
        },
        {"x": "a", "y": "b"},
    )
    params = {"x": jnp.arange(16.0).reshape(4, 4), "y": jnp.arange(16.0).reshape(4, 4)}
    state = tx.init(params)
    masks = jsp.masks(state)
    assert int(masks["x"].sum()) == 8 and int(masks["y"].sum()) == 4
    updates, state = jax.jit(tx.update)(params, state, params)
    jsp.check(optax.apply_updates(params, updates), state)


def test_updates_in_a_narrower_type_still_clear_exactly():
    """bf16 updates to f32 weights: minus the weight must not be rounded."""
    inner = optax.stateless(lambda g, p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g))
    tx = jsp.sparsify(inner, jsp.fixed({"w": YES_NO}))
    params = {"w": jnp.array([[1.001, 2.003, 3.007, 4.001]])}
    updates, _ = tx.update({"w": jnp.ones((1, 4))}, tx.init(params), params)
    assert (optax.apply_updates(params, updates)["w"][0, 1::2] == 0).all()


def test_pruned_then_tuned_keeps_its_zeros():
    params = make_params()
    pruned, masks = jsp.prune(params, jsp.global_(0.7))
    tx = jsp.sparsify(optax.adamw(1e-2, weight_decay=0.1), jsp.fixed(masks))
    state = tx.init(pruned)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, pruned)
        pruned = optax.apply_updates(pruned, updates)
    jsp.check(pruned, state)
    same(jsp.masks(state), masks)


def test_schedule_free_evaluates_sparse():
    inner = optax.contrib.schedule_free_adamw(1e-2)
    params = make_params()
    tx = jsp.sparsify(inner, jsp.static(HALF, score=jsp.magnitude))
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    evaluated = optax.contrib.schedule_free_eval_params(state.inner, params)
    jsp.check(evaluated, state)


def test_regularize_sees_gradients_before_and_updates_after():
    def regularize(params, state, grads, updates):
        if updates is None:
            return jax.tree.map(lambda g: 2 * g, grads), None
        return grads, jax.tree.map(lambda u: u - 1, updates)

    tx = jsp.sparsify(optax.sgd(1.0), spy_updater()._replace(regularize=regularize))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    same(updates, {"w": [[-2.0, -2, -4, -4]], "b": [-3.0]})


def test_kept_may_clear_an_entry_that_is_valid_before_and_after():
    def kept(old, new):
        return {"w": jnp.array([[False, True, True, True]]), "b": jnp.array(True)}

    dense = {"w": jnp.ones((1, 4), bool), "b": jnp.array(True)}
    tx = jsp.sparsify(optax.sgd(0.0, momentum=0.5), spy_updater(dense)._replace(kept=kept))
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    same(optax.apply_updates(PARAMS, updates)["w"], [[0.0, 2, 3, 4]])
    same(state.inner[0].trace["w"], [[0.0, 1, 1.5, 2]])


def test_integer_leaves_are_left_alone():
    params = {**PARAMS, "ids": jnp.array([[1, 2], [3, 4]])}
    grads = {**GRADS, "ids": jnp.zeros((2, 2), jnp.int32)}
    for inner in (
        optax.sgd(1.0),
        optax.masked(optax.adam(1e-2), {"w": True, "b": True, "ids": False}),
    ):
        tx = jsp.sparsify(inner, jsp.static(HALF, score=jsp.magnitude))
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        same(after["ids"], params["ids"])
        assert after["ids"].dtype == jnp.int32 and jsp.masks(state)["ids"].shape == ()
        jsp.check(after, state)


CALLS = []


@dataclasses.dataclass(frozen=True)
class Counted(jsp.Unstructured):
    """A pattern of a user that tells each time a selection runs."""

    def gather(self, scores):
        jax.debug.callback(lambda: CALLS.append(1))
        return super().gather(scores)


@pytest.mark.parametrize(
    "make",
    [
        lambda key: jsp.rigl(jsp.uniform(0.5, Counted()), key=key, when=jsp.every(3)),
        lambda key: jsp.set_(jsp.uniform(0.5, Counted()), key=key, when=jsp.every(3)),
        lambda key: jsp.gradual(
            jsp.uniform(0.5, Counted()), schedule=jsp.constant(0.5), when=jsp.every(3)
        ),
        lambda key: jsp.gradual(
            jsp.global_(0.5, Counted()), schedule=jsp.constant(0.5), when=jsp.every(3)
        ),
    ],
    ids=["rigl", "set", "gradual", "gradual_global"],
)
def test_a_quiet_step_under_vmap_selects_nothing(make):
    def run(seed):
        updater = make(jax.random.key(seed))
        tx = jsp.sparsify(optax.sgd(0.1), updater)
        return tx.init, tx.update

    params = {"w": jnp.arange(4 * 64.0).reshape(4, 8, 8)}  # four seeds
    state = jax.vmap(lambda seed, p: run(seed)[0](p))(jnp.arange(4), params)
    step = jax.jit(jax.vmap(lambda seed, g, s, p: run(seed)[1](g, s, p)))
    counts = []
    for _ in range(5):
        CALLS.clear()
        updates, state = jax.block_until_ready(step(jnp.arange(4), params, state, params))
        params = optax.apply_updates(params, updates)
        jax.effects_barrier()
        counts.append(len(CALLS))
    assert counts[0] > 0 and counts[3] > 0 and counts[1] == counts[2] == counts[4] == 0


def test_one_bad_seed_of_four_stops_alone(key):
    tx = jsp.sparsify(optax.adam(1e-2), jsp.rigl(HALF, key=key, when=jsp.every(1)))
    params = {"w": 1 + jnp.arange(4 * 16.0).reshape(4, 4, 4)}
    state = jax.vmap(tx.init)(params)
    bad = {"w": params["w"].at[2, 0, 0].set(jnp.nan)}
    updates, after = jax.jit(jax.vmap(tx.update))(bad, state, params)
    good, want = jax.jit(jax.vmap(tx.update))(params, state, params)
    for i in range(4):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
        same(pick(after), pick(state) if i == 2 else pick(want))
        same(updates["w"][i], jnp.zeros((4, 4)) if i == 2 else good["w"][i])


def test_no_recompile_while_masks_schedules_and_drop_fractions_move(key):
    plan = jsp.uniform(0.5)
    schedule = optax.cosine_decay_schedule(0.5, 6)
    updaters = [
        jsp.rigl(plan, key=key, when=jsp.every(2), drop_fraction=schedule),
        jsp.gradual(plan, schedule=jsp.cubic(0, 4), when=jsp.every(2)),
    ]
    for updater in updaters:
        tx, params = jsp.sparsify(optax.adam(1e-2), updater), {"w": jnp.arange(64.0).reshape(8, 8)}
        state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(6):
            _, state = step(params, state, params)
        assert step._cache_size() == 1
