"""SparseLinear as a layer, and surgery on models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as jsp

BLOCKS = {"block": (8, 8), "density": 0.5}


class Model(nnx.Module):
    """Linear layers as attributes, in a list, in a Sequential, in a dict, and one shared."""

    def __init__(self, rngs):
        self.first = nnx.Linear(16, 16, rngs=rngs)
        self.parts = nnx.List([nnx.Linear(16, 16, rngs=rngs, use_bias=False) for _ in range(2)])
        self.inner = nnx.Sequential(nnx.Linear(16, 16, rngs=rngs), jax.nn.relu)
        self.named = nnx.Dict(out=nnx.Linear(16, 16, rngs=rngs))
        self.again = self.first
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x))
        for part in self.parts:
            x = jax.nn.relu(part(x))
        return self.again(self.named.out(self.inner(x)))


def test_a_layer_computes_with_its_dense_weight():
    layer = jsp.nn.SparseLinear(16, 32, **BLOCKS, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(32.0))
    x = jax.random.normal(jax.random.key(0), (3, 16))
    np.testing.assert_allclose(layer(x), x @ layer.weight.todense() + jnp.arange(32.0), atol=1e-5)
    half = jsp.nn.SparseLinear(
        16, 32, **BLOCKS, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, use_bias=False
    )
    assert half(x).dtype == jnp.bfloat16 and half.values.dtype == jnp.float32


def test_the_largest_blocks_of_a_linear_layer_are_kept():
    linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    kernel = jnp.full((16, 16), 0.1).at[8:, :8].set(1.0).at[:8, 8:].set(-2.0)
    linear.kernel.set_value(kernel)
    layer = jsp.nn.SparseLinear.from_linear(linear, **BLOCKS)
    np.testing.assert_array_equal(layer.weight.todense(), jnp.where(abs(kernel) >= 1, kernel, 0))


def test_any_optimizer_trains_it_and_only_values_have_moments():
    model = jsp.nn.sparse_linears(Model(nnx.Rngs(0)), **BLOCKS)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, 16))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x[:, ::-1]) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    before = model.first.blocks.get_value()
    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, model.first.blocks.get_value())
    shapes = {x.shape for x in jax.tree.leaves(nnx.state(optimizer))}
    assert (16, 16) not in shapes and (2, 8, 8) in shapes


def test_surgery_reaches_every_place_and_shared_layers_stay_shared():
    model = jsp.nn.sparse_linears(Model(nnx.Rngs(0)), **BLOCKS)
    found = [type(m).__name__ for _, m in nnx.iter_modules(model)]
    assert found.count("SparseLinear") == 5 and "Linear" not in found
    assert model.first is model.again and model.parts[0].bias is None
    some = jsp.nn.sparse_linears(Model(nnx.Rngs(0)), "parts/*", **BLOCKS)
    assert isinstance(some.first, nnx.Linear)
    assert all(isinstance(part, jsp.nn.SparseLinear) for part in some.parts)
    assert some(jnp.ones((2, 16))).shape == (2, 16)


def test_errors_name_the_path_and_change_nothing():
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"where: .* matches no leaf. Near: "):
        jsp.nn.replace(model, "first/up", lambda path, old: old)
    with pytest.raises(ValueError, match=r"first: .*\(5, 8\)"):
        jsp.nn.sparse_linears(model, "first", block=(5, 8), density=0.5)
    with pytest.raises(ValueError, match=r"density is the share of blocks stored, in \(0, 1\]"):
        jsp.nn.sparse_linears(model, block=(8, 8), density=0.0)
    assert all(type(m).__name__ != "SparseLinear" for _, m in nnx.iter_modules(model))
