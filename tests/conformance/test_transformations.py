"""Every updater under every transformation of JAX and Optax that the contract names."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as jsp
from jaxsparse import testing
from tests.conformance.lists import (
    OPTIMIZERS,
    PATTERNS,
    TREES,
    UPDATERS,
    fast_jit,
    make_params,
    make_updater,
)

STEPS = 3


def stepper(updater, tx):
    def step(params, state, t):
        grads = testing.gradients_at(updater.view(params, state.updater), params, t)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def loop(step, params, state):
    for t in range(STEPS):
        params, state = step(params, state, jnp.int32(t))
    return params, state


def assert_alike(got, want):
    testing._close(got, want, "another program")


def donated(updater, tx, params, name, pattern):
    step = stepper(updater, tx)
    want = loop(fast_jit(step), params, tx.init(params))
    mine = jax.tree.map(jnp.copy, params)
    state = tx.init(mine)
    got = loop(fast_jit(step, donate_argnums=(0, 1)), mine, state)
    assert_alike(got, want)
    # The old masks of straight-through methods are not read, so not taken.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((mine, state.inner)))
    jax.block_until_ready(tx.init(params))  # what the updater holds was not given away


def scan(updater, tx, params, name, pattern):
    step = stepper(updater, tx)
    want = loop(fast_jit(step), params, tx.init(params))

    def body(carry, t):
        return step(*carry, t), None

    scanned = fast_jit(lambda *carry: jax.lax.scan(body, carry, jnp.arange(STEPS))[0])
    assert_alike(scanned(params, tx.init(params)), want)


def vmap_over_seeds(updater, tx, params, name, pattern):
    del updater, tx
    keys = jax.random.split(jax.random.key(7), 4)

    def run(key, scale):
        # Drawn anew: sizes in the tree tie, and rounding would decide what Adam makes of ties.
        def drawn(w):
            return (w * scale * jax.random.uniform(key, w.shape, minval=0.5)).astype(w.dtype)

        mine = jax.tree.map(drawn, params)
        built, _ = make_updater(name, pattern, mine, key)
        mine_tx = jsp.sparsify(optax.adam(1e-2), built)
        return loop(stepper(built, mine_tx), mine, mine_tx.init(mine))

    scales = jnp.array([1.0, 0.5, 2.0, -1.0])
    together = fast_jit(jax.vmap(run))(keys, scales)
    alone = fast_jit(run)
    for i in range(4):
        assert_alike(jax.tree.map(lambda x, i=i: x[i], together), alone(keys[i], scales[i]))


def eval_shape(updater, tx, params, name, pattern):
    abstract = jax.eval_shape(tx.init, params)
    testing._same_types(abstract, tx.init(params), "eval_shape(tx.init)")
    again = jax.eval_shape(tx.init, jax.eval_shape(lambda: params))
    testing._same_types(again, abstract, "of abstract parameters")


def tree_map_params(updater, tx, params, name, pattern):
    state = jax.eval_shape(tx.init, params)
    tagged = optax.tree_map_params(
        tx, lambda leaf: "param", state, transform_non_params=lambda leaf: "other"
    )
    assert set(jax.tree.leaves(tagged.updater.masks)) == {"param"}
    assert set(jax.tree.leaves(tagged.updater._replace(masks=()))) <= {"other"}
    for field in ("mu", "nu"):
        assert set(jax.tree.leaves(getattr(tagged.inner[0], field))) == {"param"}
    assert tagged.inner[0].count == "other"
    zipped = optax.tree_map_params(tx, lambda leaf, w: leaf.ndim in (0, w.ndim), state, params)
    assert all(jax.tree.leaves((zipped.updater.masks, zipped.inner[0].mu)))


def out_shardings(updater, tx, params, name, pattern):
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,), devices=jax.devices("cpu")[:8])

    def sharding(leaf):
        spec = P(*[None] * (leaf.ndim - 1), "x") if leaf.ndim else P()
        return NamedSharding(mesh, spec)

    shardings = optax.tree_map_params(
        tx,
        sharding,
        jax.eval_shape(tx.init, params),
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    sharded = jax.device_put(params, jax.tree.map(sharding, params))
    state = fast_jit(tx.init, out_shardings=shardings)(sharded)
    for leaf, there in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(there, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))


TRANSFORMATIONS = {
    "donated": donated,
    "scan": scan,
    "vmap": vmap_over_seeds,
    "eval_shape": eval_shape,
    "tree_map_params": tree_map_params,
    "out_shardings": out_shardings,
}

# Each updater under each transformation; trees, patterns and packing take turns, so that each
# transformation meets each tree.
_TURNS = zip(
    itertools.product(TRANSFORMATIONS, UPDATERS),
    itertools.cycle(TREES),
    itertools.cycle([*PATTERNS, "unstructured"]),
    itertools.cycle(["bool", "packed", "packed"]),
    strict=False,
)
ROWS = [(*pair, *rest) for pair, *rest in _TURNS]


@pytest.mark.parametrize(
    ("transformation", "updater", "tree", "pattern", "packed"),
    ROWS,
    ids=["-".join(r) for r in ROWS],
)
def test_contract(transformation, updater, tree, pattern, packed):
    params = make_params(tree)
    built, _ = make_updater(updater, PATTERNS[pattern], params)
    tx = jsp.sparsify(optax.adam(1e-2), built, packed=packed == "packed")
    TRANSFORMATIONS[transformation](built, tx, params, updater, PATTERNS[pattern])


def test_every_transformation_meets_every_tree():
    assert {(row[0], row[2]) for row in ROWS} == set(itertools.product(TRANSFORMATIONS, TREES))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tree_map_params_finds_what_it_finds_in_the_inner_state(optimizer):
    params = make_params()
    updater, _ = make_updater("rigl", jsp.Unstructured(), params)
    tx = jsp.sparsify(OPTIMIZERS[optimizer].inner, updater)
    outer = OPTIMIZERS[optimizer].wrap(tx)

    def tag(tx, state):
        return optax.tree_map_params(tx, lambda _: "param", state, transform_non_params=lambda _: 0)

    inner = OPTIMIZERS[optimizer].inner
    want = tag(inner, jax.eval_shape(inner.init, params))
    got = testing._inside(tag(outer, jax.eval_shape(outer.init, params)))
    assert jax.tree.leaves(got.inner) == jax.tree.leaves(want)
    assert set(jax.tree.leaves(got.updater.masks)) == {"param"} and got.updater.count == 0
