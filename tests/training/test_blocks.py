"""Training on stored blocks: what moves, what is cleared, and that probes find what is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from jaxsparse.formats._probe import Probe, attach
from jaxsparse.training._move_blocks import move_slots
from pallas_kernels import plan
from tests.conformance.lists import STORED_UPDATERS

PLAN = jsp.uniform(0.5, jsp.Block((4, 4)))
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(1e-2)),
}


def params_and_blocks(name):
    params = {"stack": jax.random.normal(jax.random.key(1), (2, 16, 8)), "bias": jnp.ones(8)}
    values, blocks = jsp.blockify(params, PLAN)
    return jsp.add_probes(values, blocks) if name == "block_rigl" else values, blocks


def loss(view, x):
    y = jnp.sum(jnp.stack([x, x + 1]) @ view["stack"], 0) + view["bias"]
    return jnp.mean((y - jnp.roll(x[:, :8], 3, 1)) ** 2)


def make_step(tx, updater):
    def step(params, state, x):
        grads = jax.grad(lambda p: loss(updater.view(p, state.updater), x))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def values_of(tree):
    leaf = tree["stack"]
    return leaf.values if hasattr(leaf, "values") and hasattr(leaf, "probe") else leaf


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STORED_UPDATERS)
def test_contract(name, optimizer, key):
    params, blocks = params_and_blocks(name)
    updater = STORED_UPDATERS[name](blocks, key)
    tx = jsp.sparsify(OPTIMIZERS[optimizer], updater)
    state, step, moved = tx.init(params), make_step(tx, updater), 0
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(state)
    for t in range(5):
        x = jax.random.normal(jax.random.key(t), (6, 16))
        before = state
        if t == 2:  # a NaN changes nothing, not even what probes have gathered
            after = step(params, state, x.at[0, 0].set(jnp.nan))
            jax.tree.map(np.testing.assert_array_equal, after, (params, state))
        params, state = step(params, state, x)
        old, new = before.updater.blocks["stack"].rows, state.updater.blocks["stack"].rows
        gone = np.asarray(old != new)
        moved += gone.sum()
        assert (np.asarray(values_of(params))[gone] == 0).all()
        for leaf in jax.tree.leaves(state.inner):
            if leaf.shape == values_of(params).shape:
                assert (np.asarray(leaf)[gone] == 0).all()
        columns = np.sort(np.asarray(new).reshape(2, 2, 2), -1)
        assert (np.diff(columns, axis=-1) > 0).all()  # two different rows in every column
        if name == "block_rigl":
            assert (params["stack"].probe == 0).all()
        jsp.check(params, state)
    assert (moved > 0) == (name != "block_static")
    assert step._cache_size() == 1
    masks = jsp.masks(state)
    assert masks["bias"].shape == () and jax.tree.leaves(masks["stack"])[0].all()


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


def test_the_probe_measures_the_gradient_of_every_block(key):
    x, dy = (
        jax.random.normal(k, s)
        for k, s in zip(jax.random.split(key), ((9, 8), (9, 12)), strict=True)
    )
    blocks = (x.T @ dy).reshape(2, 4, 3, 4).swapaxes(1, 2)  # [R, C, bk, bn]

    def measured(key):
        ku, kv = jax.random.split(key)
        u, v = jax.random.rademacher(ku, (4,), x.dtype), jax.random.rademacher(kv, (4,), x.dtype)
        y = x @ jnp.zeros((8, 12))
        pull = jax.vjp(lambda p: attach(y, x, Probe(p, u, v)), jnp.zeros((2, 3)))[1]
        return pull(dy)[0], jnp.einsum("k,rckn,n->rc", u, blocks, v)

    got, want = jax.vmap(measured)(jax.random.split(key, 4096))
    np.testing.assert_allclose(got, want, atol=1e-4)
    norms = jnp.sum(blocks**2, (-2, -1))
    np.testing.assert_allclose(jnp.mean(got**2, 0), norms, rtol=0.15)  # 4096 draws: 2 to 4 %


def test_rigl_finds_the_blocks_that_the_task_needs(key):
    """Reverse 8 blocks of features: 8 of 64 blocks do it, one in every column; 16 are stored."""
    x = jax.random.normal(key, (256, 32))
    want = x.reshape(256, 8, 4)[:, ::-1].reshape(256, 32)
    w = 0.3 * jax.random.normal(jax.random.key(1), (32, 32))
    values, blocks = jsp.blockify([w], jsp.uniform(0.75, jsp.Block((4, 4))))
    when = jsp.every(8, start=8, stop=64)
    found = {}
    for name, updater, params in (
        (
            "rigl",
            jsp.block_rigl(blocks, key=key, when=when, drop_fraction=0.5),
            jsp.add_probes(values, blocks),
        ),
        ("static", jsp.block_static(blocks), values),
    ):
        tx = jsp.sparsify(optax.adam(3e-2), updater)

        @jax.jit
        def step(params, state, tx=tx, updater=updater):
            def of(params):
                return jnp.mean((x @ updater.view(params, state.updater)[0] - want) ** 2)

            updates, state = tx.update(jax.grad(of)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(72):
            params, state = step(params, state)
        rows = state.updater.blocks[0].rows.reshape(8, 2)
        found[name] = int((rows == 7 - jnp.arange(8)[:, None]).sum())
    assert found["rigl"] == 8 > found["static"]


def test_errors():
    values, blocks = jsp.blockify({"w": jnp.eye(8)}, PLAN)
    with pytest.raises(ValueError, match="block_rigl trains add_probes"):
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
