"""Models of experts from dense ones: the same function, state and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as jsp
from models import transformer
from models.moe import Config, MoETransformer

CONFIG = Config(
    width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=24, experts=4, chosen=2,
    shared=0, context=16,
)  # fmt: skip
PLAN = {f"layers/moe/{name}": f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")}
PLAN["layers/moe_norm/scale"] = "layers/mlp_norm/scale"
TOKENS = jax.random.randint(jax.random.key(0), (1, 8), 0, 256)


def models(config=CONFIG, hidden=24):
    dense = transformer.Transformer(
        dataclasses.replace(config.active, hidden=hidden), rngs=nnx.Rngs(0)
    )
    return dense, MoETransformer(config, rngs=nnx.Rngs(1))


RUN = nnx.jit(lambda model: model(TOKENS))


def test_copies_under_normalized_weights_are_the_dense_model():
    dense, sparse = models()
    old, new = nnx.state(dense, nnx.Param), nnx.state(sparse, nnx.Param)
    params = jsp.moe.upcycle(old, new, PLAN)
    nnx.update(sparse, params)
    np.testing.assert_allclose(RUN(sparse)[0], RUN(dense), atol=1e-4)
    router = new["layers"]["moe"]["router"]["kernel"].get_value()
    np.testing.assert_array_equal(sparse.layers.moe.router["kernel"][...], router)


def test_slices_that_all_run_are_the_dense_model():
    given = jnp.broadcast_to(jnp.arange(4), (8, 4))
    all_four = jsp.moe.Router(
        lambda logits, state, **_: jsp.moe.given().route(logits, (), given=given)
    )
    config = dataclasses.replace(CONFIG, router=all_four)
    dense, sparse = models(config, hidden=96)
    params = jsp.moe.upcycle(nnx.state(dense, nnx.Param), nnx.state(sparse, nnx.Param), PLAN)
    nnx.update(sparse, params)
    sparse.layers.moe.down[...] *= 4  # `given` takes the mean of the four
    np.testing.assert_allclose(RUN(sparse)[0], RUN(dense), atol=1e-4)


def test_noise_makes_experts_differ_and_needs_a_key(key):
    dense, sparse = {"w": jnp.ones((3, 3))}, {"w": jnp.zeros((2, 3, 3))}
    new = jsp.moe.upcycle(dense, sparse, {"w": "w"}, noise=0.1, key=key)["w"]
    assert np.all(new[0] != new[1]) and np.abs(np.asarray(new) - 1).max() < 0.5
    with pytest.raises(ValueError, match="needs key="):
        jsp.moe.upcycle(dense, sparse, {"w": "w"}, noise=0.1)


def test_moments_and_counts_follow():
    dense, sparse = models()
    old, new = nnx.state(dense, nnx.Param), nnx.state(sparse, nnx.Param)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    grads = jax.tree.map(jnp.ones_like, old)
    _, state = tx.update(grads, tx.init(old), old)
    moved = jsp.moe.upcycle_state(state, tx.init(new), old, new, PLAN)
    adam, before = moved[1][0], state[1][0]
    assert int(adam.count) == 1
    mu = before.mu["layers"]["mlp"]["up"]["kernel"].get_value()
    for expert in range(4):
        got = adam.mu["layers"]["moe"]["up"].get_value()[:, expert]
        np.testing.assert_array_equal(got, mu)
    assert not np.any(adam.nu["layers"]["moe"]["router"]["kernel"].get_value())
    with pytest.raises(ValueError, match="one optimizer"):
        jsp.moe.upcycle_state(optax.sgd(0.1).init(old), tx.init(new), old, new, PLAN)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"experts": "mpl"}, "Near: mlp"),
        ({"expert": "mlp"}, "Near: experts"),
        ({"experts": "odd"}, r"experts of shape \(4, 2, 6\) cannot come from a matrix \(2, 5\)"),
        ({"few": "mlp"}, r"few of shape \(3, 2, 3\)"),  # two slices for three experts
    ],
)
def test_a_plan_that_does_not_fit_is_named(plan, message):
    dense = {"mlp": jnp.ones((2, 6)), "odd": jnp.ones((2, 5))}
    sparse = {"experts": jnp.ones((4, 2, 6)), "few": jnp.ones((3, 2, 3))}
    with pytest.raises(ValueError, match=message):
        jsp.moe.upcycle(dense, sparse, plan)
