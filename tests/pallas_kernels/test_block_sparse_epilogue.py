"""Bias, activation and 8-bit values of block-sparse matmul: XLA here and TPU in interpret mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _block_sparse_matmul_tpu as kernels
from pallas_kernels import _block_sparse_tpu as tiles
from pallas_kernels import block_sparse_matmul, plan
from pallas_kernels._block_sparse_matmul import CASES, OP
from pallas_kernels._compat import races_found
from tests.pallas_kernels.cases import assert_close, operands
from tests.pallas_kernels.tpu import interpret

BY_NAME = {case.name: case for case in CASES}
SMALL = BY_NAME["unbalanced, empty lines, spare slots"]
FEW = (BY_NAME["ragged rows"], BY_NAME["nothing stored"], SMALL, BY_NAME["bf16"])
FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def with_bias(case, transpose):
    x, values, dy, topology = operands(case)
    x, dy = (dy, x) if transpose else (x, dy)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal(dy.shape[1]), case.dtype)
    return x, values, topology, bias, dy


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_bias_and_activation_with_gradients(case, transpose):
    x, values, topology, bias, dy = with_bias(case, transpose)

    def through(function, x, values, bias, dy):
        y, pull = jax.vjp(
            lambda x, values, bias: function(
                x, values, topology, bias=bias, activation=jax.nn.silu, transpose=transpose
            ),
            x,
            values,
            bias,
        )
        return y, *pull(dy)

    with jax.numpy_dtype_promotion("strict"):
        got = jax.jit(lambda *a: through(block_sparse_matmul, *a))(x, values, bias, dy)
        alone = block_sparse_matmul(
            x, values, topology, bias=bias, activation=jax.nn.silu, transpose=transpose
        )
    want = through(OP.reference, x, values, bias, dy)
    for a, b in zip((*got, alone), (*want, want[0]), strict=True):
        assert a.dtype == jnp.dtype(case.dtype)
        assert_close(a, b, case.tolerance)


def test_the_activation_meets_sums_that_are_not_rounded():
    x, values, topology, _, _ = with_bias(BY_NAME["bf16"], False)
    steps = lambda z: z - z.astype(jnp.bfloat16).astype(z.dtype)  # noqa: E731
    assert np.asarray(block_sparse_matmul(x, values, topology, activation=steps)).any()


def test_a_bias_alone_and_of_a_weight_that_stores_nothing():
    x, values, topology, bias, dy = with_bias(FEW[0], False)
    slope = jax.grad(lambda b: (block_sparse_matmul(x, values, topology, bias=b) * dy).sum())(bias)
    assert_close(slope, dy.sum(0), 1e-5)
    none = plan(jnp.zeros(0, int), jnp.zeros(0, int), topology.grid)
    y = block_sparse_matmul(x, values[:0], none, bias=bias, activation=jnp.exp)
    assert_close(y, np.broadcast_to(np.exp(bias), y.shape), 1e-6)
    with pytest.raises(ValueError, match=r"one entry an output, shape \(384,\); got \(512,\)"):
        block_sparse_matmul(x, values, topology, bias=x[0])


def test_under_vmap_over_biases():
    x, values, topology, bias, _ = with_bias(SMALL, False)
    biases = jnp.stack([bias, -bias])
    run = lambda b: block_sparse_matmul(x, values, topology, bias=b, activation=jnp.tanh)  # noqa: E731
    for b, y in zip(biases, jax.vmap(run)(biases), strict=True):
        assert_close(y, run(b), 1e-6)


@pytest.mark.parametrize("stored", FLOAT8)
@pytest.mark.parametrize("fan_in", [True, False])
def test_eight_bit_values_are_storage_only(stored, fan_in):
    case = FEW[0] if fan_in else SMALL
    x, values, dy, topology = operands(case)
    values = values.astype(stored)
    with jax.numpy_dtype_promotion("strict"):
        y, pull = jax.vjp(lambda x, v: block_sparse_matmul(x, v, topology), x, values)
        dx, dvalues = pull(dy)
        half = block_sparse_matmul(x.astype(jnp.bfloat16), values, topology)
    wide = values.astype(jnp.float32)
    want, pull = jax.vjp(lambda x, v: block_sparse_matmul(x, v, topology), x, wide)
    assert y.dtype == dx.dtype == jnp.float32 and half.dtype == jnp.bfloat16
    for got, expected in zip((y, dx), (want, pull(dy)[0]), strict=True):
        assert_close(got, expected, 1e-5)
    assert_close(half, want, 1e-2)
    assert dvalues.dtype == stored
    np.testing.assert_array_equal(dvalues, pull(dy)[1].astype(stored))
    assert_close(OP.reference(x, values, topology), want, 1e-5)
    with pytest.raises(TypeError, match=r"a float of 16 bits or more; got float8"):
        block_sparse_matmul(x.astype(stored), values, topology)


# TPU, in interpret mode with a search for races.


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_tpu_bias_and_activation(case, transpose):
    x, values, topology, bias, _ = with_bias(case, transpose)
    options = {"activation": jax.nn.gelu, "interpret": interpret()}
    run = lambda *a: kernels.matmul(*a[:3], transpose, bias=a[3], **options)  # noqa: E731
    y = jax.jit(run)(x, values, topology, bias)
    assert not races_found()
    want = OP.reference(x, values, topology, bias=bias, activation=jax.nn.gelu, transpose=transpose)
    assert y.dtype == jnp.dtype(case.dtype)
    assert_close(y, want, case.tolerance)


@pytest.mark.parametrize("over", ["x", "bias"])
def test_tpu_under_vmap(over):
    case = dataclasses.replace(SMALL, m=16, grid=(2, 2), spare=1)
    x, values, topology, bias, _ = with_bias(case, False)
    xs, biases = jnp.stack([x, -x]), jnp.stack([bias, 2 * bias])
    run = lambda x, b: kernels.matmul(x, values, topology, False, bias=b, interpret=interpret())  # noqa: E731
    axes = (0, None) if over == "x" else (None, 0)
    operand = xs if over == "x" else x, bias if over == "x" else biases
    ys = jax.jit(jax.vmap(run, axes))(*operand)
    assert not races_found()
    for i in range(2):
        at = (xs[i], bias) if over == "x" else (x, biases[i])
        assert_close(ys[i], OP.reference(at[0], values, topology, bias=at[1]), case.tolerance)


@pytest.mark.parametrize(("stored", "merge"), [(FLOAT8[0], True), (FLOAT8[1], False)])
def test_tpu_eight_bit_values(stored, merge):
    case = dataclasses.replace(SMALL, m=16, grid=(4, 3), density=0.6, spare=2)
    x, values, dy, topology = operands(case)
    config = tiles.Config(16, 2, merge)

    def run(x, dy, values, topology):
        y = kernels.matmul(x, values, topology, False, config=config, interpret=interpret())
        return y, *kernels.gradients(x, dy, values, topology, interpret=interpret())

    got = jax.jit(run)(x, dy, values.astype(stored), topology)
    assert not races_found()
    wide = values.astype(stored).astype(jnp.float32)
    want, pull = jax.vjp(lambda x, v: OP.reference(x, v, topology), x, wide)
    dx, dvalues = pull(dy)
    assert_close(got[0], want, case.tolerance)
    assert_close(got[1], dx, case.tolerance)
    assert got[2].dtype == stored
    assert_close(got[2], dvalues, 2.0 ** -(jnp.finfo(stored).nmant + 1) * 1.01)


def test_what_the_tpu_kernels_cannot_fetch():
    assert tiles.supports("bfloat16", 128, 128, jnp.float8_e5m2) == ""
    assert "float8_e4m3fn, float8_e5m2; got float8_e4m3b11fnuz" in tiles.supports(
        "bfloat16", 128, 128, jnp.dtype(jnp.float8_e4m3b11fnuz)
    )
