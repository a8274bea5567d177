"""Training on stored blocks: what moves, what is cleared, and that probes find what is missing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from jaxsparse.training._move_blocks import move_slots
from pallas_kernels import plan
from tests.conformance.lists import STORED_PLAN, STORED_UPDATERS, fast_jit

PLAN = jsp.uniform(0.5, jsp.Block((4, 4)))
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(1e-2)),
}


# Each updater with adam, and each other optimizer with two updaters that take turns.
PAIRS = [(name, "adam") for name in STORED_UPDATERS]
PAIRS += list(zip(itertools.cycle(STORED_UPDATERS), [*OPTIMIZERS][1:] * 2, strict=False))


def params_and_blocks(case):
    params = {"stack": jax.random.normal(jax.random.key(1), (2, 16, 8)), "bias": jnp.ones(8)}
    values, blocks = jsp.blockify(params, STORED_PLAN)
    return jsp.add_probes(values, blocks) if case.probed else values, blocks


def loss(view, x):
    y = jnp.sum(jnp.stack([x, x + 1]) @ view["stack"], 0) + view["bias"]
    return jnp.mean((y - jnp.roll(x[:, :8], 3, 1)) ** 2)


def make_step(tx, updater):
    def step(params, state, x):
        grads = jax.grad(lambda p: loss(updater.view(p, state.updater), x))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return fast_jit(step)


def values_of(tree):
    leaf = tree["stack"]
    return leaf.values if hasattr(leaf, "values") and hasattr(leaf, "probe") else leaf


@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_contract(name, optimizer, key):
    case = STORED_UPDATERS[name]
    params, blocks = params_and_blocks(case)
    updater = case.build(blocks, key)
    tx = jsp.sparsify(OPTIMIZERS[optimizer], updater)
    state, step, moved = tx.init(params), make_step(tx, updater), 0
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(state)
    held = 2
    for t in range(5):
        x = jax.random.normal(jax.random.key(t), (6, 16))
        before = state
        if t == 2:  # a NaN changes nothing, not even what probes have gathered
            after = step(params, state, x.at[0, 0].set(jnp.nan))
            jax.tree.map(np.testing.assert_array_equal, after, (params, state))
        params, state = step(params, state, x)
        old, new = before.updater.blocks["stack"], state.updater.blocks["stack"]
        gone = np.asarray((old.rows != new.rows) | ~new.used)
        moved += (gone & np.asarray(new.used)).sum()
        assert (np.asarray(values_of(params))[gone] == 0).all()
        for leaf in jax.tree.leaves(state.inner):
            if leaf.shape == values_of(params).shape:
                assert (np.asarray(leaf)[gone] == 0).all()
        counts = np.asarray(new.used).reshape(2, 2, 2).sum(-1)
        assert (counts == counts[0, 0]).all() and counts[0, 0] <= held  # every column as many
        held = counts[0, 0]
        assert new.block_map.sum() == counts.sum()  # all at different places
        if case.probed:
            assert (params["stack"].probe == 0).all()
        jsp.check(params, state)
    assert held == case.final
    assert (moved > 0) == case.moves
    assert step._cache_size() == 1
    masks = jsp.masks(state)
    assert masks["bias"].shape == ()
    assert (jax.tree.leaves(masks["stack"])[0][..., 0, 0] == new.used).all()


def test_blocks_move_as_worked_out_by_hand():
    """3 rows x 2 columns, two slots a column; a quarter of four slots moves: one."""
    topology = plan(jnp.array([0, 1, 2, 0]), jnp.array([0, 0, 1, 1]), (3, 2), fan_in=2)
    values = jnp.array([3.0, 1.0, 2.0, 4.0])[:, None, None]  # slot 1, at (1, 0), is smallest
    scores = jnp.array([[9.0, 9.0], [0.0, 7.0], [5.0, 9.0]])
    moved = move_slots(topology, values, scores, jnp.float32(0.25))
    assert moved.rows.tolist() == [0, 2, 2, 0]  # the best in column 0 that is not stored is row 2
    again = move_slots(topology, values, scores.at[1, 0].set(6.0), jnp.float32(0.25))
    assert again.rows.tolist() == [0, 1, 2, 0]  # row 1 itself is best: it stays in its slot
    most = move_slots(topology, values, scores, jnp.float32(1.0))
    assert most.rows.tolist() == [0, 2, 2, 0]  # column 1: rows 0 and 2 have the largest scores
    assert most.col_start.tolist() == [0, 2, 4] and most.row_start.tolist() == [0, 2, 2, 4]


def test_errors():
    values, blocks = jsp.blockify({"w": jnp.eye(8)}, PLAN)
    with pytest.raises(ValueError, match="block_gradual train add_probes"):
        jsp.sparsify(
            optax.sgd(0.1), jsp.block_rigl(blocks, key=jax.random.key(0), when=jsp.once(0))
        ).init(values)
    with pytest.raises(ValueError, match=r"w has values \(8, 4, 4\), but its topology has slots"):
        jsp.sparsify(optax.sgd(0.1), jsp.block_static(blocks)).init({"w": jnp.ones((8, 4, 4))})
    with pytest.raises(ValueError, match="the parameters have 2 leaves, but blocks has 1"):
        jsp.sparsify(optax.sgd(0.1), jsp.block_static(blocks)).init({**values, "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="drop_fraction"):
        jsp.block_set(blocks, key=jax.random.key(0), when=jsp.once(0), drop_fraction=2.0)
    with pytest.raises(ValueError, match=r"w is planned with Unstructured"):
        jsp.blockify({"w": jnp.eye(8)}, jsp.uniform(0.5))
