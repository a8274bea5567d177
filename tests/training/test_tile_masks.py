"""PATCH: masks by hand, their distribution, and that the tiles that matter are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from jaxsparse.training._tile_masks import nm_patterns

NM24, TILE = jsp.NM(2, 4), jsp.Block((4, 2))
W = jax.random.normal(jax.random.key(0), (8, 6))
HALF = jsp.make_mask(NM24, jnp.abs(W), 0.5)


@pytest.mark.parametrize(("n", "m", "count"), [(2, 4, 6), (1, 2, 2), (2, 8, 28)])
def test_every_pattern_is_there(n, m, count):
    table = nm_patterns(n, m)
    assert len({tuple(row) for row in table}) == count and (table.sum(1) == n).all()


@pytest.mark.parametrize("axis", [-2, -1])
def test_the_final_mask_is_dense_where_the_tile_says_so_and_else_the_pattern_of_the_mask(axis):
    pattern = jsp.NM(2, 4, axis=axis)
    tile = jsp.Block((4, 2) if axis == -2 else (2, 4))
    w = jax.random.normal(jax.random.key(0), (3, 8, 8))
    half = jsp.make_mask(pattern, jnp.abs(w), 0.5)
    draw = jax.jit(lambda logits, key: jsp.tile_mask(logits, pattern, tile, half, key=key))
    for learn in (False, True):
        logits = jsp.tile_logits(
            pattern, tile, half, key=jax.random.key(1), learn_patterns=learn, deviation=1e-3
        )
        dense = np.asarray(logits.tiles) > 0
        assert dense.any() and not dense.all()
        dense = dense.repeat(tile.shape[0], -2).repeat(tile.shape[1], -1)
        got = jsp.tile_mask(logits, pattern, tile, half)
        # The leaning to the mask's own pattern, three deviations a shared entry, mostly wins.
        same = (np.asarray(got) == np.where(dense, 1, half)).mean()
        assert same == 1 if not learn else same > 0.9
        soft = draw(logits, key=jax.random.key(2))
        assert ((soft >= 0) & (soft <= 1)).all() and not (np.isin(soft, (0, 1))).all()


def test_hard_samples_have_the_probabilities_of_the_logits_and_a_gradient():
    logits = jsp.TileLogits(jnp.full((2, 3), 1.0), jnp.zeros((2, 6, 6)).at[..., 0].set(1.0))
    keys = jax.random.split(jax.random.key(3), 4000)

    def sample(key):
        return jsp.tile_mask(logits, NM24, TILE, HALF, key=key, hard=True)

    masks = np.asarray(jax.jit(jax.vmap(sample))(keys))
    assert np.isin(masks, (0, 1)).all()
    groups = masks.reshape(-1, 2, 4, 6).sum(2)
    assert np.isin(groups, (2, 4)).all()
    tile = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose((groups == 4).mean(0), tile, atol=0.04)
    first = np.e / (np.e + 5)  # entry 0: patterns 0, 1 and 2 of six
    want = tile + (1 - tile) * (first + 2 * (1 - first) / 5)
    np.testing.assert_allclose(masks[:, [0, 4]].mean(0), want, atol=0.04)

    def total(logits):
        return (jsp.tile_mask(logits, NM24, TILE, HALF, key=keys[0], hard=True) * jnp.abs(W)).sum()

    slopes = jax.jit(jax.grad(total))(logits)
    assert (slopes.tiles > 0).all() and (slopes.choices != 0).any()


def test_tiles_that_matter_are_learned_dense_at_the_density_that_was_asked_for():
    """The claim: at the same density, learned tiles beat random ones."""
    w = jax.random.normal(jax.random.key(4), (16, 8))
    importance = jnp.repeat(jnp.array([8.0, 0.1, 8.0, 0.1]), 4)  # of groups of inputs
    x = importance * jax.random.normal(jax.random.key(5), (64, 16))
    half = jsp.make_mask(NM24, jnp.abs(w), 0.5)
    tx = optax.adam(0.02)

    def error(mask):
        return jnp.mean(jnp.square(x @ (w * mask) - x @ w))

    def step(carry, t):
        logits, state = carry

        def loss(logits):
            mask = jsp.tile_mask(
                logits,
                NM24,
                TILE,
                half,
                key=jax.random.fold_in(jax.random.key(6), t),
                temperature=2.0 * 0.98**t,
                scale=5.0,
            )
            return error(mask) + 300 * jnp.abs(mask.mean() - 0.75)

        updates, state = tx.update(jax.grad(loss)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    @jax.jit
    def learn():
        logits = jsp.tile_logits(NM24, TILE, half, key=jax.random.key(7))
        (logits, _), _ = jax.lax.scan(step, (logits, tx.init(logits)), jnp.arange(200))
        return jsp.tile_mask(logits, NM24, TILE, half)

    mask = learn()
    assert abs(float(mask.mean()) - 0.75) < 0.04
    by_tile = np.asarray(mask).reshape(4, 4, 4, 2).mean((1, 3))
    assert (by_tile[[0, 2]] == 1).mean() > 0.9
    shuffled = [
        error(
            jnp.where(
                jax.random.permutation(jax.random.key(i), jnp.arange(16) % 2 == 0)
                .reshape(4, 4)
                .repeat(4, 0)
                .repeat(2, 1),
                1,
                half,
            )
        )
        for i in range(8)
    ]
    assert error(mask) < 0.5 * jnp.array(shuffled).mean()


def test_what_does_not_fit_is_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="axis -2 of the tile must be a multiple of 4"):
        jsp.tile_logits(NM24, jsp.Block((2, 2)), HALF, key=key)
    with pytest.raises(ValueError, match="has 12870 patterns"):
        mask = jnp.ones((16, 2), bool)
        jsp.tile_logits(jsp.NM(8, 16), jsp.Block((16, 1)), mask, key=key, learn_patterns=True)
    with pytest.raises(ValueError, match="temperature of a softmax must be > 0; got 0"):
        jsp.tile_mask(jsp.tile_logits(NM24, TILE, HALF, key=key), NM24, TILE, HALF, temperature=0)
