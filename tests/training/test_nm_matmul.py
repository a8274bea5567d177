"""The three products of training, each against its own masked product, and two claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import NM24, SEEDS, loss_of, over_seeds, problem

X = jax.random.normal(jax.random.key(0), (2, 8, 12))
W = jax.random.normal(jax.random.key(1), (12, 16))
DY = jax.random.normal(jax.random.key(2), (2, 8, 16))
INPUTS, OUTPUTS = jsp.NM(2, 4), jsp.NM(2, 4, axis=-1)


def masked(pattern):
    return np.where(jsp.make_mask(pattern, jnp.abs(W), 0.5), W, 0)


def test_every_product_has_the_mask_of_its_own_axis():
    key = jax.random.key(3)

    def product(x, w):
        return jsp.nm_matmul(x, w, forward=INPUTS, backward=OUTPUTS, gradient=jsp.NM(2, 4), key=key)

    y, back = jax.vjp(jax.jit(product), X, W)
    dx, dw = back(DY)
    np.testing.assert_allclose(y, X @ masked(INPUTS), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, DY @ masked(OUTPUTS).T, rtol=1e-5, atol=1e-5)
    sampled = jsp.mvue(jsp.NM(2, 4), DY.reshape(16, 16), key=key)
    np.testing.assert_allclose(dw, X.reshape(16, 12).T @ sampled, rtol=1e-5, atol=1e-5)
    assert (np.asarray(sampled).reshape(4, 4, 16) != 0).sum() == 4 * 2 * 16


def test_without_patterns_it_is_the_dense_product_also_stacked():
    for got, want in zip(
        jax.vjp(jsp.nm_matmul, X, W)[1](DY), jax.vjp(jnp.matmul, X, W)[1](DY), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    stacked = jax.vmap(lambda w: jsp.nm_matmul(X[0], w, forward=INPUTS))(jnp.stack([W, 2 * W]))
    np.testing.assert_allclose(stacked[1], 2 * stacked[0], rtol=1e-5)


def test_the_gradient_of_the_weight_is_right_on_average():
    keys = jax.random.split(jax.random.key(4), 2000)

    def dw(key):
        product = lambda w: jsp.nm_matmul(X, w, gradient=INPUTS, key=key)  # noqa: E731
        return jax.vjp(product, W)[1](DY)[0]

    drawn = jax.jit(jax.vmap(dw))(keys)
    exact = jax.vjp(lambda w: X @ w, W)[1](DY)[0]
    bound = 5 * np.asarray(drawn.std(0)) / np.sqrt(len(keys))
    assert (np.abs(drawn.mean(0) - exact) <= bound + 1e-5).all()


def test_training_with_a_mask_in_both_directions_works():
    """The claim of BDWP: a second mask in the backward product costs little."""
    updater = jsp.dense_when(jsp.ste(NM24), lambda step: step >= 0)

    def product(x, w, key):
        if w.shape[-1] % 8:  # 4 outputs
            return x @ w
        return jsp.nm_matmul(x, w, forward=INPUTS, backward=OUTPUTS)

    def one_way(x, w, key):
        return x @ w if w.shape[-1] % 8 else jsp.nm_matmul(x, w, forward=INPUTS)

    both, one = (over_seeds(updater, matmul=f)[2] for f in (product, one_way))

    def losses(params, product):
        def of(params, seed):
            return loss_of(params, *problem(seed)[:2], lambda x, w: product(x, w, None))

        return jax.vmap(of)(params, SEEDS)

    start = jax.vmap(lambda seed: problem(seed)[2])(SEEDS)
    before, after = losses(start, product), losses(both, product)
    assert (after < 0.2 * before).all() and after.mean() < 2 * losses(one, one_way).mean()


def test_unbiased_gradients_find_the_mean_where_the_largest_do_not():
    """The claim of MVUE. Each of 64 tokens wants another constant; most are small, some large."""
    y = jax.random.exponential(jax.random.key(5), (64, 4))
    x = jnp.ones((64, 1))

    @jax.custom_vjp
    def largest(w):
        return x @ w

    def back(_, dy):
        mask = jsp.make_mask(INPUTS, jnp.abs(dy), 0.5)
        return (x.T @ jnp.where(mask, dy, 0),)

    largest.defvjp(lambda w: (x @ w, None), back)

    def fit(product):
        def step(w, t):
            loss = lambda w: jnp.sum(jnp.square(product(w, t) - y)) / 128  # noqa: E731
            return w - 0.5 / jnp.sqrt(1 + t) * jax.grad(loss)(w), None

        return jax.jit(lambda: jax.lax.scan(step, jnp.zeros((1, 4)), jnp.arange(400))[0])()

    def sampled(w, t):
        return jsp.nm_matmul(x, w, gradient=INPUTS, key=jax.random.fold_in(jax.random.key(6), t))

    def error(product):
        return float(jnp.abs(fit(product) - y.mean(0)).max())

    assert error(sampled) < 0.1 < 0.2 < error(lambda w, t: largest(w))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": INPUTS}, "needs key="),
        ({"gradient": OUTPUTS, "key": jax.random.key(0)}, "axis=-2 and a multiple of 4"),
        (
            {"gradient": jsp.NM(2, 5), "key": jax.random.key(0)},
            "multiple of 5 of them; .* 16 tokens",
        ),
        ({"forward": jsp.NM(2, 5)}, "to be a multiple of 5"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        jsp.nm_matmul(X, W, **options)
    with pytest.raises(ValueError, match=r"weight \[K, N\]; got \(1, 12, 16\)"):
        jsp.nm_matmul(X, W[None])
