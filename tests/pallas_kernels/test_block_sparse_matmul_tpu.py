"""The TPU kernels of block-sparse matmul in interpret mode, which looks for races, and lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _block_sparse_matmul as op
from pallas_kernels import _block_sparse_matmul_tpu as kernels
from pallas_kernels import _block_sparse_tpu as tiles
from pallas_kernels import _op, block_sparse_matmul
from pallas_kernels._block_sparse_matmul import CASES
from pallas_kernels._compat import Tpu, races_found
from tests.pallas_kernels.cases import assert_close, operands, oracle
from tests.pallas_kernels.tpu import interpret

SMALL = next(case for case in CASES if case.name == "unbalanced, empty lines, spare slots")
V5E, V5P, V6E = Tpu(128 * 2**20, 128), Tpu(64 * 2**20, 128, 2), Tpu(128 * 2**20, 256)


def run(x, dy, values, topology, *, product=None, gradient=None, mode=None):
    """y, dx and dvalues; the configurations are of the products and of dvalues."""
    mode = mode or interpret()
    y = kernels.matmul(x, values, topology, False, config=product, interpret=mode)
    dx = kernels.matmul(dy, values, topology, True, config=product, interpret=mode)
    block = values.shape[-2:]
    return y, dx, kernels.gradient(x, dy, topology, block, config=gradient, interpret=mode)


def check(got, case, x, dy, values, topology):
    assert not races_found()
    _, *want = oracle(x, values, dy, topology)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.dtype(case.dtype)
        assert_close(a, b, case.tolerance)
    assert (np.asarray(got[2])[~np.asarray(topology.used)] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case):
    x, values, dy, topology = operands(case)
    got = jax.jit(run)(x, dy, values, topology)
    check(got, case, x, dy, values, topology)


@pytest.mark.parametrize(("order", "cores", "merge"), [("on_wait", 2, True), ("eager", 1, False)])
def test_panels_strips_cores_and_orders_of_copies(order, cores, merge):
    case = dataclasses.replace(SMALL, m=64, grid=(4, 3), density=0.6, spare=2)
    x, values, dy, topology = operands(case)
    got = jax.jit(
        lambda *a: run(
            *a,
            product=kernels.Config(16, 2, merge, cores),
            gradient=kernels.Config(32, 2, cores=cores, strip=2),
            mode=interpret(dma_execution_mode=order, num_cores_or_threads=cores),
        )
    )(x, dy, values, topology)
    check(got, case, x, dy, values, topology)


def test_columns_of_x_that_no_block_reads_do_not_matter():
    x, values, dy, topology = operands(SMALL)
    x = x.at[:, 128:256].set(jnp.inf)  # block row 1 is empty
    got = jax.jit(lambda *a: kernels.matmul(*a, False, interpret=interpret()))(x, values, topology)
    assert_close(got, oracle(x.at[:, 128:256].set(0), values, dy, topology)[1], SMALL.tolerance)


@pytest.mark.parametrize("over", [(0, 0, None, None), (0, 0, 0, None), (0, 0, 0, 0)])
def test_under_vmap(over):
    case = dataclasses.replace(SMALL, m=16, grid=(2, 2), spare=1)
    parts = [operands(case, seed) for seed in (0, 0)]
    alone = [(x * (i + 1), dy, v * (2 - i), t) for i, (x, v, dy, t) in enumerate(parts)]
    stacked = [
        part[0] if axis is None else jax.tree.map(lambda *a: jnp.stack(a), *part)
        for part, axis in zip(zip(*alone, strict=True), over, strict=True)
    ]
    got = jax.jit(jax.vmap(run, over))(*stacked)
    assert not races_found()
    for i in range(2):
        x, dy, values, topology = (
            part[0] if axis is None else part[i]
            for part, axis in zip(zip(*alone, strict=True), over, strict=True)
        )
        check([a[i] for a in got], case, x, dy, values, topology)


def loss(x, values, topology, transpose=False):
    return op._matmul("tpu", transpose, x, values, topology).sum()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lowers_for_tpu_with_gradients(case, transpose):
    x, values, dy, topology = operands(case)
    grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=3)
    text = grad.trace(dy if transpose else x, values, topology, transpose)
    text = text.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3


def test_lowers_under_vmap_checkpoint_and_scan():
    x, values, _, topology = operands(SMALL)
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), (values, topology))

    def total(x, values, topologies):
        body = jax.checkpoint(lambda s, layer: (s + loss(x, *layer), None))
        return jax.lax.scan(body, 0.0, (values, topologies))[0]

    xs = jnp.stack([x, x])
    grad = jax.jit(jax.vmap(jax.grad(total, (0, 1)), (0, None, None)))
    assert "tpu_custom_call" in grad.trace(xs, *layers).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("device", [V5E, V5P, V6E, Tpu()], ids=["v5e", "v5p", "v6e", "default"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_fit_and_waste_little(device, dtype):
    item = jnp.dtype(dtype).itemsize
    for m in (1, 37, 512, 5000, 8192):
        for depth in (128, 4096, 28672):
            for block in ((128, 128), (128, 256), (512, 512)):
                for slots in (1, 100, 4000):
                    args = (m, depth, 64, block, slots, dtype, device)
                    c = kernels.choose_config(*args)
                    assert c.bm % (32 // item) == 0 and c.cores == device.cores
                    assert tiles.product_bytes(c.bm, c.group, depth, *block, item) < device.vmem
                    panels = -(-m // (c.bm * c.cores)) * c.cores
                    assert panels * c.bm - m < panels * 32 // item
                    assert c.merge == (block[0] < device.mxu <= block[1])
                    c = kernels.choose_config(*args, gradient=True)
                    used = tiles.gradient_bytes(c.bm, c.group, c.strip, depth, *block, item)
                    assert c.bm % 128 == 0 and c.strip >= 1 and used < device.vmem


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(NotImplementedError, match=r"holds 128 rows of x in VMEM at least"):
        kernels.choose_config(8, 2**20, 64, (128, 128), 9, "bfloat16", V5P, gradient=True)
    places = jax.ShapeDtypeStruct((90_000,), jnp.int32)
    topology = jax.eval_shape(lambda rows: op.Topology(*[rows] * 6), places)
    with pytest.raises(NotImplementedError, match="90000 slots take more. Take larger blocks"):
        jax.eval_shape(lambda t: tiles.prefetched(t, 8, 1, transpose=False), topology)


def test_blocks_that_a_tpu_cannot_tile(monkeypatch):
    case = dataclasses.replace(CASES[0], block=(64, 128), m=8)
    x, values, dy, topology = operands(case)
    assert kernels.supports("float32", 128, 256) == kernels.supports("bfloat16", 256, 128) == ""
    assert "multiples of 128; got 64 x 128" in kernels.supports("float32", 64, 128)
    assert "float32 and bfloat16; got float16" in kernels.supports("float16", 128, 128)
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    y = block_sparse_matmul(x, values, topology)  # by the XLA form
    assert_close(y, oracle(x, values, dy, topology)[1], case.tolerance)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        block_sparse_matmul(x, values, topology, implementation="tpu")
