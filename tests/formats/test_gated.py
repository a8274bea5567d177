"""The gated product of weights of any kind, and the layer that uses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as jsp
from jaxsparse.formats import _gated
from jaxsparse.formats._probe import Sketch


def weights(seed=0, lead=(), **options):
    keys = jax.random.split(jax.random.key(seed))
    make = lambda key, density: jsp.BlockSparse.random(  # noqa: E731
        key, (*lead, 16, 24), block=(4, 8), density=density, **options
    )
    return make(keys[0], 0.25), make(keys[1], 0.5)


def composed(x, gate, up, activation=jax.nn.silu):
    return activation(x @ gate.todense()) * (x @ up.todense())


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused operation."""
    calls = []

    def count(*operands, **options):
        calls.append(operands)
        return jsp_gated(*operands, **options)

    jsp_gated = _gated.block_sparse_gated
    monkeypatch.setattr(_gated, "block_sparse_gated", count)
    return calls


@pytest.mark.parametrize("lead", [(), (3,)])
def test_stored_blocks_in_one_go_with_gradients(lead, fused):
    gate, up = weights(lead=lead)
    x, dy = (jax.random.normal(jax.random.key(i), (*lead, 5, n)) for i, n in ((1, 16), (2, 24)))

    def through(product):
        run = lambda x, v, w: product(  # noqa: E731
            x, dataclasses.replace(gate, values=v), dataclasses.replace(up, values=w)
        )
        y, pull = jax.vjp(run, x, gate.values, up.values)
        return y, *pull(dy)

    want = through(composed)
    assert not fused
    got = through(lambda *a: jsp.gated_product(*a))
    assert len(fused) == 1
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="needs x of shape"):
        jsp.gated_product(x[..., :-1], gate, up)


def test_other_weights_by_three_products(fused):
    gate, up = weights()
    x = np.ones((5, 16), np.float32)
    dense = gate.todense(), up.todense()
    rows = [jnp.array([[0], [1], [2]])] * 2
    wide = [jsp.BlockSparse.from_rows(w, (8, 8), r % 2) for w, r in zip(dense, rows, strict=True)]
    sides = [jsp.BlockSparse.from_dense(w.T, (8, 4)).T for w in dense]
    for pair in (dense, (gate, dense[1]), sides, (gate, wide[1])):
        todense = [w if isinstance(w, jax.Array) else w.todense() for w in pair]
        want = jnp.tanh(x @ todense[0]) * (x @ todense[1])
        np.testing.assert_allclose(
            jsp.gated_product(x, *pair, activation=jnp.tanh), want, atol=1e-5
        )
    above = dataclasses.replace(gate, dense_above=0.1)
    np.testing.assert_allclose(jsp.gated_product(x, above, up), composed(x, gate, up), atol=1e-5)
    assert not fused
    jsp.gated_product(x, gate, up)
    assert fused


def test_probes_are_measured(fused):
    gate, up = weights()
    probe = Sketch(jnp.zeros(gate.topology.grid), jnp.ones(4), jnp.ones(8))
    x = jax.random.normal(jax.random.key(1), (5, 16))

    def loss(at):
        probed = dataclasses.replace(gate, probe=dataclasses.replace(probe, at=at))
        return jsp.gated_product(x, probed, up).sum()

    slopes = jax.grad(lambda w: (jax.nn.silu(x @ w) * (x @ up)).sum())(gate.todense())
    want = slopes.reshape(4, 4, 3, 8).sum((1, 3))
    np.testing.assert_allclose(jax.grad(loss)(probe.at), want, atol=1e-4)
    assert not fused


def test_eight_bit_weights():
    gate, up = (w.astype(jnp.float8_e4m3fn) for w in weights())
    x = jax.random.normal(jax.random.key(1), (5, 16))
    want = composed(x, gate.astype(x.dtype), up.astype(x.dtype))
    np.testing.assert_allclose(jsp.gated_product(x, gate, up), want, atol=1e-5)
    dense = dataclasses.replace(gate, dense_above=0.1)
    np.testing.assert_allclose(x @ dense, x @ gate, atol=1e-5)


def test_rows_over_devices_of_an_explicit_mesh(devices):
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,), devices=devices)
    gate, up = weights()
    x = jax.random.normal(jax.random.key(1), (16, 16))

    def loss(x, v, w):
        pair = (dataclasses.replace(a, values=b) for a, b in ((gate, v), (up, w)))
        return (jsp.gated_product(x, *pair) ** 2).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    want = grad(x, gate.values, up.values)
    with jax.set_mesh(mesh):
        lay = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
        got = grad(lay(x, "data"), lay(gate.values), lay(up.values))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_layer_learns_and_only_values_are_trained():
    mlp = jsp.nn.SparseGatedMLP(16, 32, block=(8, 8), density=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, 16))
    want = composed(x, mlp.gate.weight, mlp.up.weight) @ mlp.down.weight.todense()
    np.testing.assert_allclose(mlp(x), want, atol=1e-5)
    assert len(jax.tree.leaves(nnx.state(mlp, nnx.Param))) == 3
    optimizer = nnx.Optimizer(mlp, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(mlp, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x[:, ::-1]) ** 2))(mlp)
        optimizer.update(mlp, grads)
        return loss

    losses = [float(step(mlp, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    half = jsp.nn.SparseGatedMLP(
        16, 32, block=(8, 8), density=0.5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    assert half(x).dtype == jnp.bfloat16 and half.gate.values.dtype == jnp.float32
