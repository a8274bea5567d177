"""Steps of the algorithms worked out by hand, on eight weights or fewer."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse as jsp

KEY = jax.random.key(0)
HALF = jsp.uniform(0.5)
YES = jnp.array(True)

# w, mask, gradient, drop fraction, new mask
RIGL = {
    "two leave, two come": (
        [8, -1, 6, 2, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [9, 0, 9, 0, 1, -5, 3, 2],
        0.5,
        [1, 0, 1, 0, 0, 1, 1, 0],
    ),
    "one that leaves comes back": (
        [8, -1, 6, 2, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 9, 0, 0, 1, -5, 3, 2],
        0.5,
        [1, 1, 1, 0, 0, 1, 0, 0],
    ),
    "none moves": ([1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 5, 6], 0.0, [1, 1, 0, 0]),
    "all move": ([1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 5, 6], 1.0, [0, 0, 1, 1]),
    "half of 3 is 2": (
        [1, 2, 3, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 2, 3],
        0.5,
        [0, 0, 1, 0, 1, 1],
    ),
    "half of 5 is 2": (
        [1, 2, 3, 4, 5, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 3, 2],
        0.5,
        [0, 0, 1, 1, 1, 0, 1, 1],
    ),
    "equal weights: the first stay": (
        [2, 2, 2, 2, 0, 0, 0, 0],
        [1] * 4 + [0] * 4,
        [0] * 4 + [1] * 4,
        0.5,
        [1, 1, 0, 0, 1, 1, 0, 0],
    ),
    "no gradient: the first come": ([3, 4, 0, 0], [0, 1, 1, 0], [0] * 4, 0.5, [1, 1, 0, 0]),
    "a kept zero leaves before nothing": (
        [0, 4, 7, 7],
        [1, 1, 0, 0],
        [0, 0, 1, 2],
        0.5,
        [0, 1, 0, 1],
    ),
}


@pytest.mark.parametrize(("w", "mask", "grad", "drop", "new"), RIGL.values(), ids=RIGL)
def test_rigl(w, mask, grad, drop, new):
    params, grads = {"w": jnp.array([w], jnp.float32)}, {"w": jnp.array([grad], jnp.float32)}
    updater = jsp.rigl(HALF, key=KEY, when=jsp.every(1), drop_fraction=drop)
    state = updater.init(params)._replace(masks={"w": jnp.array([mask], bool)})
    state = updater.update(state, params, grads, finite=YES)
    assert state.masks["w"].astype(int).tolist() == [new] and state.count == 1


def test_a_whole_rigl_step_with_momentum():
    """lr 1/2, momentum 1/2: what stays moves, what leaves is zero, what comes starts at zero."""
    updater = jsp.rigl(HALF, key=KEY, when=jsp.once(1), drop_fraction=0.5)
    tx = jsp.sparsify(optax.sgd(0.5, momentum=0.5), updater)
    params = {"w": jnp.array([[8.0, 4, 2, 1]])}
    state = tx.init(params)
    mask = {"w": jnp.array([[True, True, False, False]])}
    state = state._replace(updater=state.updater._replace(masks=mask))
    table = [  # gradient, weights after it, momentum after it
        ([4, 2, 8, 1], [6, 3, 0, 0], [4, 2, 0, 0]),
        ([2, 2, 1, 8], [4, 0, 0, 0], [4, 0, 0, 0]),  # 3 leaves, the last one comes
        ([2, 9, 9, 2], [2, 0, 0, -1], [4, 0, 0, 2]),
    ]
    for grad, weights, trace in table:
        updates, state = tx.update({"w": jnp.array([grad], jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        assert params["w"].tolist() == [weights]
        assert state.inner[0].trace["w"].tolist() == [trace]
    assert jsp.masks(state)["w"].tolist() == [[True, False, False, True]]


def test_set_drops_the_smallest_and_grows_at_random():
    params = {"w": jnp.array([[5.0, 1, 4, 0]])}

    def step(key):
        updater = jsp.set_(HALF, key=key, when=jsp.every(1), drop_fraction=1 / 3)
        state = updater.init(params)._replace(masks={"w": jnp.array([[True, True, True, False]])})
        return updater.update(state, params, params, finite=YES).masks["w"][0]

    masks = jax.jit(jax.vmap(step))(jax.random.split(KEY, 12)).astype(int)
    # What left may come back.
    assert set(map(tuple, masks.tolist())) == {(1, 1, 1, 0), (1, 0, 1, 1)}


# pattern, schedule, when, kept of eight weights after each step
GRADUAL = {
    "every step": (jsp.Unstructured(), jsp.linear(0, 4), jsp.every(1), [8, 7, 6, 5, 4, 4]),
    "the end is no multiple": (
        jsp.Unstructured(),
        jsp.linear(0, 4),
        jsp.every(3),
        [8, 8, 8, 5, 4, 4, 4],
    ),
    "the end after stop": (
        jsp.Unstructured(),
        jsp.linear(0, 4),
        jsp.every(2, stop=3),
        [8, 8, 6, 6, 4, 4],
    ),
    "only the end": (jsp.Unstructured(), jsp.linear(0, 2), jsp.once(99), [8, 8, 4, 4]),
    "at once": (jsp.Unstructured(), jsp.constant(), jsp.once(99), [4, 4]),
    "begin is end": (jsp.Unstructured(), jsp.cubic(1, 1), jsp.every(9), [8, 4, 4]),
    "cubic": (jsp.Unstructured(), jsp.cubic(0, 2), jsp.every(1), [8, 4, 4]),  # 1 - 0.5 * 7/8 -> 4.5
    "cosine": (jsp.Unstructured(), jsp.cosine(0, 2), jsp.every(1), [8, 6, 4]),
    "2:4": (jsp.NM(2, 4, axis=-1), jsp.linear(0, 2), jsp.every(1), [8, 6, 4]),
    "blocks": (jsp.Block((1, 2)), jsp.linear(0, 2), jsp.every(1), [8, 6, 4]),
    "never there": (jsp.Unstructured(), jsp.constant(0.5), jsp.every(1), [6, 6]),
}


@pytest.mark.parametrize(("pattern", "schedule", "when", "kept"), GRADUAL.values(), ids=GRADUAL)
def test_gradual(pattern, schedule, when, kept):
    params = {"w": jnp.array([[3.0, 1, 8, 6, 7, 2, 4, 5]])}
    updater = jsp.gradual(jsp.uniform(0.5, pattern), schedule=schedule, when=when)
    state = updater.init(params)
    update = jax.jit(updater.update)
    counts = []
    for _ in kept:
        state = update(state, params, params, finite=YES)
        counts.append(int(state.masks["w"].sum()))
    assert counts == kept


def test_gradual_keeps_the_largest_of_the_moment():
    updater = jsp.gradual(HALF, schedule=jsp.linear(0, 2), when=jsp.every(1))
    state = updater.init({"w": jnp.ones((1, 4))})
    table = [
        ([1, 2, 3, 4], [1, 1, 1, 1]),
        ([1, 2, 3, 4], [0, 1, 1, 1]),
        ([9, 5, 1, 0], [1, 1, 0, 0]),
    ]
    for w, mask in table:
        params = {"w": jnp.array([w], jnp.float32)}
        state = updater.update(state, params, params, finite=YES)
        assert state.masks["w"].astype(int).tolist() == [mask]


def test_gradual_makes_its_last_update_after_a_bad_gradient():
    updater = jsp.gradual(HALF, schedule=jsp.linear(0, 2), when=jsp.once(99))
    params = {"w": jnp.array([[4.0, 3, 2, 1]])}
    state, kept = updater.init(params), []
    for finite in (True, True, False, False, True, True):
        state = updater.update(state, params, params, finite=jnp.array(finite))
        kept.append(int(state.masks["w"].sum()))
    assert kept == [4, 4, 4, 4, 2, 2] and state.count == 4


# decay, weights, gradient, weights after sgd(1), mask after it
SR_STE = {
    "pull alone": (0.5, [4, 2], [0, 0], [4, 1], [1, 0]),
    "kept ones are not pulled": (0.5, [4, 2], [1, 1], [3, 0], [1, 0]),
    "the mask turns": (0.5, [4, -2], [3, 3], [1, -4], [0, 1]),
    "no pull is ste": (0.0, [4, 2], [1, 1], [3, 1], [1, 0]),
}


@pytest.mark.parametrize(("decay", "w", "grad", "after", "mask"), SR_STE.values(), ids=SR_STE)
def test_sr_ste(decay, w, grad, after, mask):
    updater = jsp.sr_ste(HALF, decay=decay)
    tx, params = jsp.sparsify(optax.sgd(1.0), updater), {"w": jnp.array([w], jnp.float32)}
    updates, state = tx.update({"w": jnp.array([grad], jnp.float32)}, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert params["w"].tolist() == [after]
    assert jsp.masks(state)["w"].astype(int).tolist() == [mask]
    seen = updater.view(params, state.updater)["w"].tolist()
    assert seen == [[a * m for a, m in zip(after, mask, strict=True)]]
