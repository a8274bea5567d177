"""The Hopper kernels of block-sparse matmul: interpreted, which finds races, and lowered."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import _block_sparse_gpu as tiles
from pallas_kernels import _block_sparse_matmul as op
from pallas_kernels import _block_sparse_matmul_gpu as kernels
from pallas_kernels import _op, block_sparse_matmul, plan
from pallas_kernels._compat import gpu_races_found, runs_in_gpu_kernel
from tests.pallas_kernels.cases import assert_close, operands, oracle
from tests.pallas_kernels.gpu import interpret, lower, needs_interpreter


def half(case):
    """A case in blocks of half the size, which interpret mode takes a quarter of the time for.

    The kernels take 16-bit floats: float32 becomes float16, with the tolerance of that.
    """
    bk, bn = case.block
    case = dataclasses.replace(case, block=(bk // 2, bn // 2))
    if case.dtype == "bfloat16":
        return case
    return dataclasses.replace(case, dtype="float16", tolerance=2e-3)


CASES = [half(case) for case in op.CASES]
SMALL = next(case for case in CASES if case.name == "unbalanced, empty lines, spare slots")
SMALL = dataclasses.replace(SMALL, m=40, grid=(4, 3), density=0.7, spare=3)


def run(x, dy, values, topology, *, product=None, gradient=None):
    """y, dx and dvalues; the configurations are of the products and of dvalues."""
    block = values.shape[-2:]
    cols = tiles._part(min(block), 128)
    product = product or kernels.Config(64, cols, 3, 3)
    gradient = gradient or kernels.Config(tiles._part(block[0], 128), cols, 3, 3)
    mode = interpret()
    y = kernels.matmul(x, values, topology, False, config=product, interpret=mode)
    dx = kernels.matmul(dy, values, topology, True, config=product, interpret=mode)
    return y, dx, kernels.gradient(x, dy, topology, block, config=gradient, interpret=mode)


def check(got, case, x, dy, values, topology):
    assert not gpu_races_found()
    _, *want = oracle(x, values, dy, topology)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.dtype(case.dtype)
        assert_close(a, b, case.tolerance)
    assert (np.asarray(got[2])[~np.asarray(topology.used)] == 0).all()


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case):
    x, values, dy, topology = operands(case)
    check(jax.jit(run)(x, dy, values, topology), case, x, dy, values, topology)


@needs_interpreter
@pytest.mark.parametrize(
    ("block", "rows", "cols", "stages", "splits"),
    [((128, 64), 128, 64, 2, 1), ((192, 128), 64, 64, 3, 1), ((128, 128), 64, 128, 4, 2)],
    ids=["two blocks a pair", "odd number of tiles", "tokens in two parts"],
)
def test_tiles_of_the_gradient(block, rows, cols, stages, splits):
    case = dataclasses.replace(SMALL, m=200, grid=(3, 2), block=block, spare=2)
    x, values, dy, topology = operands(case)
    config = kernels.Config(rows, cols, stages, 2, splits)
    got = jax.jit(lambda *a: kernels.gradient(*a, block, config=config, interpret=interpret()))(
        x, dy, topology
    )
    assert not gpu_races_found()
    assert_close(got, oracle(x, values, dy, topology)[3], case.tolerance)
    assert (np.asarray(got)[~np.asarray(topology.used)] == 0).all()


@needs_interpreter
def test_panels_of_rows_and_parts_of_output_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "PANEL_BYTES", 2 * 256 * 128 * 2)  # two tiles: panels of 2 and 1
    case = dataclasses.replace(SMALL, m=520, grid=(2, 2), block=(64, 256), density=0.8)
    x, values, _, topology = operands(case)
    config = kernels.Config(128, 128, 2, 3)
    got = jax.jit(lambda *a: kernels.matmul(*a, False, config=config, interpret=interpret()))(
        x, values, topology
    )
    assert not gpu_races_found()
    assert_close(got, oracle(x, values, jnp.zeros((520, 512)), topology)[1], case.tolerance)


@needs_interpreter
@pytest.mark.parametrize(
    "activation", [None, jnp.tanh, jax.nn.softplus], ids=["none", "fused", "applied after"]
)
@pytest.mark.parametrize("transpose", [False, True])
def test_bias_and_activation(activation, transpose):
    x, values, dy, topology = operands(SMALL)
    w = oracle(x, values, dy, topology)[0]
    x, w = (dy, w.T) if transpose else (x, w)
    bias = jnp.linspace(-3, 3, w.shape[1]).astype(x.dtype)
    got = kernels.matmul(
        x,
        values,
        topology,
        transpose,
        bias=bias,
        activation=activation,
        config=kernels.Config(64, 64, 3, 2),
        interpret=interpret(),
    )
    assert not gpu_races_found() and got.dtype == x.dtype
    want = np.asarray(x, np.float32) @ w + np.asarray(bias, np.float32)
    assert_close(got, want if activation is None else activation(want), SMALL.tolerance)


@needs_interpreter
def test_columns_of_x_that_no_block_reads_do_not_matter():
    x, values, dy, topology = operands(SMALL)
    x = x.at[:, 64:128].set(jnp.inf)  # block row 1 is empty
    got = jax.jit(run)(x, dy, values, topology)[0]
    assert_close(got, oracle(x.at[:, 64:128].set(0), values, dy, topology)[1], SMALL.tolerance)


@needs_interpreter
@pytest.mark.parametrize("over", [(0, 0, None, None), (0, None, 0, None), (0, 0, 0, 0)])
def test_under_vmap(over):
    parts = [operands(SMALL, seed) for seed in (0, 0)]
    alone = [(x * (i + 1), dy, v * (2 - i), t) for i, (x, v, dy, t) in enumerate(parts)]
    stacked = [
        part[0] if axis is None else jax.tree.map(lambda *a: jnp.stack(a), *part)
        for part, axis in zip(zip(*alone, strict=True), over, strict=True)
    ]
    got = jax.jit(jax.vmap(run, over))(*stacked)
    assert not gpu_races_found()
    for i in range(2):
        x, dy, values, topology = (
            part[0] if axis is None else part[i]
            for part, axis in zip(zip(*alone, strict=True), over, strict=True)
        )
        check([a[i] for a in got], SMALL, x, dy, values, topology)


@needs_interpreter
def test_a_bias_for_each_of_stacked_weights():
    x, values, dy, topology = operands(SMALL)
    stack = partial(jax.tree.map, lambda a: jnp.stack([a, a]))
    bias = jnp.arange(2.0)[:, None] * jnp.ones((2, dy.shape[1]))
    multiply = lambda v, t, b: kernels.matmul(  # noqa: E731
        x, v, t, False, bias=b, config=kernels.Config(64, 64, 2, 2), interpret=interpret()
    )
    got = jax.jit(jax.vmap(multiply))(stack(values), stack(topology), bias)
    assert not gpu_races_found()
    want = oracle(x, values, dy, topology)[1]
    assert_close(got, np.stack([want, want + 1]), SMALL.tolerance)


def loss(x, values, topology, transpose=False):
    return op._matmul("gpu", transpose, x, values, topology).sum()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_lowers_for_cuda_with_gradients(case, transpose):
    x, values, dy, topology = operands(case)
    grad = jax.value_and_grad(partial(loss, transpose=transpose), (0, 1))
    text = lower(grad, dy if transpose else x, values, topology)
    assert text.count("@mosaic_gpu_v2(") + text.count("call @mosaic_gpu(") == 3


def test_lowers_under_vmap_checkpoint_and_scan():
    x, values, _, topology = operands(SMALL)
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), (values, topology))

    def total(x, values, topologies):
        body = jax.checkpoint(lambda s, layer: (s + loss(x, *layer), None))
        return jax.lax.scan(body, jnp.zeros((), x.dtype), (values, topologies))[0]

    xs = jnp.stack([x, x])
    grad = jax.vmap(jax.grad(total, (0, 1)), (0, None, None))
    assert "mosaic_gpu" in lower(grad, xs, *layers)


def test_lowers_inside_shard_map(monkeypatch, devices):
    monkeypatch.setattr(_op, "here", lambda: "gpu")
    x, values, _, topology = operands(SMALL)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    grad = jax.grad(lambda x, v, t: block_sparse_matmul(x, v, t).sum(), (0, 1))
    rows, whole = P("data"), P()  # the gradient of the values is summed over devices
    grad = jax.shard_map(grad, mesh=mesh, in_specs=(rows, whole, whole), out_specs=(rows, whole))
    text = lower(grad, x, values, topology)
    assert "mosaic_gpu" in text and "all_reduce" in text


@pytest.mark.parametrize(
    ("activation", "fused"),
    [
        (jax.nn.gelu, True),
        (jax.nn.silu, True),
        (jax.nn.leaky_relu, True),
        (lambda x: jnp.sin(x) * jnp.cos(x) / jnp.exp(x) - jnp.log(jnp.abs(x)), True),
        (lambda x: jnp.minimum(-x, jnp.square(x)) * jnp.sign(x) + x**3, True),
        (lambda x: jax.lax.rsqrt(x) + jnp.exp2(x), True),
        (jax.nn.relu, jax.__version_info__ >= (0, 12)),
        (jax.nn.softplus, False),
        (partial(jax.nn.gelu, approximate=False), False),
        (lambda x: x * jnp.arange(64.0), False),
    ],
)
def test_what_runs_in_a_kernel_lowers(activation, fused):
    assert runs_in_gpu_kernel(activation) == fused
    if fused:
        x, values, dy, topology = operands(SMALL)
        bias = jnp.ones(dy.shape[1], dy.dtype)
        multiply = partial(kernels.matmul, bias=bias, activation=activation)
        assert "mosaic_gpu" in lower(lambda *a: multiply(*a, False), x, values, topology)


def test_tiles_fit_and_lists_are_balanced():
    for m in (1, 100, 8192):
        for bk in (64, 128, 192, 256, 320, 512):
            for bn in (64, 128, 192, 256, 512):
                for config, outer in (
                    (tiles.choose_config(m, 1, 64, bn), bn),
                    (tiles.choose_gradient_config(m, 100, (bk, bn)), bn),
                ):
                    assert outer % config.cols == 0 and config.rows % 64 == 0
                    assert config.rows * config.cols <= tiles.MOST_SUMS and config.stages >= 4
                    used = tiles.shared_bytes(config.rows, config.cols, config.stages)
                    assert used <= tiles.SHARED_MEMORY
    assert tiles.choose_gradient_config(8192, 16, (128, 128)).splits == 16
    assert tiles.choose_gradient_config(8192, 4000, (128, 128)).splits == 1
    rows, cols = jnp.array([0, 2, 1, 9, 2]), jnp.array([1, 1, 2, 0, 2])
    topology = jax.tree.map(lambda a: a[None], plan(rows, cols, (3, 4)))
    lists = kernels.lines(topology, False)
    assert lists.out.tolist() == [1, 2, 0, 3]
    assert (lists.end - lists.begin).tolist() == [2, 2, 0, 0]
    assert lists.slot[:4].tolist() == [0, 1, 2, 4] and lists.source[:4].tolist() == [0, 2, 1, 2]


def test_blocks_that_hopper_cannot_take(monkeypatch):
    case = dataclasses.replace(SMALL, block=(64, 32), m=8)
    x, values, dy, topology = operands(case)
    assert kernels.supports("float16", 64, 256) == kernels.supports("bfloat16", 192, 64) == ""
    assert "multiples of 64; got 64 x 32" in kernels.supports("float16", 64, 32)
    assert "bfloat16 and float16; got float32" in kernels.supports("float32", 64, 64)
    monkeypatch.setattr(_op, "here", lambda: "gpu")
    y = block_sparse_matmul(x, values, topology)  # by the XLA form
    assert_close(y, oracle(x, values, dy, topology)[1], case.tolerance)
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        block_sparse_matmul(x, values, topology, implementation="gpu")
