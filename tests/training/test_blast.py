"""BLaST on masks: worked by hand, and what growth is for."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse as jsp

W = jnp.array([[3, 0, 1, 1, 2, 0, 0, 1]], jnp.float32)  # squared norms of pairs: 9, 2, 4, 1
GRAD = jnp.array([[0, 0, 1, 0, 0, 1, 2, 2]], jnp.float32)  # 0, 1, 1, 8
PAIRS = jsp.Block((1, 2))


def kept(sparsity, drop, steps=1, grad=GRAD, schedule=None):
    updater = jsp.blast(
        jsp.uniform(sparsity, PAIRS),
        schedule=schedule or jsp.constant(),
        when=jsp.every(1),
        drop_fraction=drop,
    )
    state = updater.init([W])
    for _ in range(steps):
        state = updater.update(state, [W], [grad], finite=jnp.array(True))
    return state.masks[0][0, ::2].astype(int).tolist()


def test_masks_by_hand():
    assert kept(0.5, 0.0) == [1, 0, 1, 0]  # by weight alone
    assert kept(0.5, 0.5) == [1, 0, 0, 1]  # one of two by gradient: 8
    assert kept(0.5, 1.0) == [0, 1, 0, 1]  # both; the first of the equal gradients
    assert kept(0.75, 0.3) == [1, 0, 0, 0]  # 0.3 of one rounds to none
    assert kept(0.5, 0.5, schedule=jsp.constant(0.0)) == [1, 1, 1, 1]  # nothing is asked for yet


def test_what_left_can_come_back_when_the_gradient_says_so():
    updater = jsp.blast(
        jsp.uniform(0.5, PAIRS), schedule=jsp.constant(), when=jsp.every(1), drop_fraction=0.5
    )
    tx = jsp.sparsify(optax.sgd(0.0), updater)
    params, state = [W], tx.init([W])
    for grad, want in ((GRAD, [1, 0, 0, 1]), (GRAD[:, ::-1], [1, 0, 0, 0]), (W, [1, 0, 1, 0])):
        updates, state = tx.update([grad], state, params)
        params = optax.apply_updates(params, updates)
        now = jsp.masks(state)[0][0, ::2].astype(int).tolist()
        assert now[0] == want[0] and sum(now) == 2
    assert params[0][0, 6:].tolist() == [0, 0]  # it came in with zeros


def test_growth_repairs_early_pruning(key):
    """Blocks that matter are small at first: pruned by weight alone they are lost for good."""
    r, b = 8, 4
    x = jax.random.normal(key, (256, r * b))
    target = jnp.kron(jnp.eye(r)[::-1], jnp.eye(b))  # one block in every row and column
    noise = jax.random.normal(jax.random.key(1), target.shape)
    params = [jnp.where(jnp.kron(jnp.eye(r)[::-1], jnp.ones((b, b))) > 0, 0.01, 0.3) * noise]
    found = {}
    for drop in (0.0, 0.3):
        updater = jsp.blast(
            jsp.uniform(0.875, jsp.Block((b, b))),
            schedule=jsp.cubic(0, 10),
            when=jsp.every(5, stop=80),
            drop_fraction=drop,
        )
        tx = jsp.sparsify(optax.adam(3e-2), updater)

        def step(carry, _, tx=tx):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((x @ p[0] - x @ target) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda c, step=step: jax.lax.scan(step, c, None, length=100)[0])
        _, state = run((params, tx.init(params)))
        mask = jsp.masks(state)[0]
        assert mask.sum() == r * b * b
        found[drop] = int((mask & (target > 0)).sum()) // b
    assert found[0.3] == r > found[0.0]


def test_errors():
    with pytest.raises(ValueError, match="drop_fraction"):
        kept(0.5, 2.0)
