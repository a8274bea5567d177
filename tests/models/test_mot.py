"""Mixture of transformers: against a token by token look-up, and against the dense block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import transformer
from models.mot import MoTBlock

CONFIG = transformer.Config(width=8, heads=2, kv_heads=1, head_width=4, hidden=12)
X = jax.random.normal(jax.random.key(0), (2, 6, 8))
MODALITY = jnp.array([[0, 2, 2, 0, 2, 0], [2, 2, 2, 2, 0, 2]])  # of three; nobody is of 1


@pytest.fixture(scope="module")
def block():
    block = MoTBlock(CONFIG, 3, rngs=nnx.Rngs(0))
    for i, norm in enumerate((block.attention_norm, block.mlp_norm)):
        norm.set_value(jax.random.uniform(jax.random.key(i), (3, 8), minval=0.5))
    return block


def loop(block, x, modality):
    """Each token with the weights of its modality, looked up for it."""
    c = block.config

    def product(x, w):
        return jnp.einsum("btk,btkn->btn", x, w.get_value()[modality])

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[...][modality]

    y, at = norm(x, block.attention_norm), jnp.arange(x.shape[1])
    q, k, v = (
        product(y, w).reshape(*x.shape[:2], -1, c.head_width)
        for w in (block.query, block.key, block.value)
    )
    q, k = (transformer.rope(z, at, c.rope_base) for z in (q, k))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(*x.shape[:2], -1)
    x = x + product(y, block.out)
    y = norm(x, block.mlp_norm)
    return x + product(jax.nn.silu(product(y, block.gate)) * product(y, block.up), block.down)


def test_outputs_and_gradients_against_a_look_up_for_each_token(block):
    graph, params = nnx.split(block)

    def total(run):
        return lambda p, x: jnp.sum(jnp.sin(run(nnx.merge(graph, p), x, MODALITY)))

    np.testing.assert_allclose(block(X, MODALITY), loop(block, X, MODALITY), atol=1e-5)
    got, want = (
        jax.jit(jax.grad(total(run), (0, 1)))(params, X) for run in (MoTBlock.__call__, loop)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not np.any(got[0]["up"].get_value()[1]) and np.any(got[0]["up"].get_value()[2])


def test_one_modality_is_the_dense_block(block):
    dense = transformer.Block(CONFIG, rngs=nnx.Rngs(1))
    for name in ("query", "key", "value", "out"):
        getattr(dense.attention, name).kernel.set_value(getattr(block, name)[...][2])
    for name in ("gate", "up", "down"):
        getattr(dense.mlp, name).kernel.set_value(getattr(block, name)[...][2])
    for name in ("attention_norm", "mlp_norm"):
        getattr(dense, name).scale.set_value(getattr(block, name)[...][2])
    got = block(X, jnp.full((2, 6), 2))
    np.testing.assert_allclose(got, dense(X, jnp.arange(6))[0], atol=1e-5)


def test_attention_reaches_over_modalities(block):
    moved = block(X.at[0, 1].add(1.0), MODALITY) - block(X, MODALITY)
    assert np.any(np.abs(moved[0, 3]) > 1e-4)  # modality 0 sees what changed in modality 2
    assert not np.any(moved[0, 0]) and not np.any(moved[1])
