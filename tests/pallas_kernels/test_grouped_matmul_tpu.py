"""The TPU kernels of grouped matmul in interpret mode, which looks for races, and lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _grouped_ffn as ffn
from pallas_kernels import _grouped_matmul as op
from pallas_kernels import _grouped_matmul_tpu as kernels
from pallas_kernels import _grouped_tpu as tiles
from pallas_kernels import _op, grouped_matmul
from pallas_kernels._compat import Tpu, races_found, tpu
from pallas_kernels._grouped_gradient_tpu import gradient
from pallas_kernels._grouped_matmul import CASES
from tests.pallas_kernels.cases import assert_close
from tests.pallas_kernels.grouped import operands, oracle
from tests.pallas_kernels.tpu import TOPOLOGIES, compile_for, interpret, needs_libtpu, scope, vmem

TILED = [case for case in CASES if case.k % 128 == case.n % 128 == 0]
UNEVEN = next(case for case in CASES if case.name.startswith("uneven"))
V5E, V5P, V6E = Tpu(128 * 2**20, 128), Tpu(64 * 2**20, 128, 2), Tpu(128 * 2**20, 256)


def run(x, w, dy, sizes, *, product=None, dw=None, mode=None):
    """y, dx, dw and y again from the transposed matrices; the configurations are of their kinds."""
    mode = mode or interpret()
    y = kernels.matmul(x, w, sizes, False, config=product, interpret=mode)
    turned = w.swapaxes(1, 2)
    dx = kernels.matmul(dy, w, sizes, True, interpret=mode)
    again = kernels.matmul(x, turned, sizes, True, config=product, interpret=mode)
    return y, dx, gradient(x, dy, sizes, config=dw, interpret=mode), again


def check(got, case, x, w, dy, sizes):
    assert not races_found()
    want = oracle(x, w, dy, sizes)
    for a, b in zip(got, (*want, want[0]), strict=True):
        assert a.dtype == jnp.dtype(case.dtype)
        assert_close(a, b, case.tolerance)


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_every_case(case):
    given = operands(case)
    check(jax.jit(run)(*given), case, *given)


@pytest.mark.parametrize(("order", "cores"), [("on_wait", 2), ("eager", 1)])
def test_small_tiles_cores_and_orders_of_copies(order, cores):
    # Tiles of 64 rows, halves of which suffice or not; 5 tiles of 128 columns, the last one alone.
    case = dataclasses.replace(UNEVEN, k=256, n=256 if cores == 2 else 640)
    given = operands(case)
    product = tiles.Config(64, 128 if cores == 2 else 256, 128, cores)
    dw = tiles.Config(32, 128, 128, cores)
    mode = interpret(dma_execution_mode=order, num_cores_or_threads=cores)
    got = jax.jit(lambda *a: run(*a, product=product, dw=dw, mode=mode))(*given)
    check(got, case, *given)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays_in_its_group(bad):
    x, w, dy, sizes = operands(UNEVEN)
    want = oracle(x, w, dy, sizes)
    y, dx, dw, _ = jax.jit(run)(x.at[40].set(bad), w, dy.at[41].set(bad), sizes)
    rows, others = np.r_[0:40, 42:312], np.array([0, 1, 3, 4, 5])  # both are of group 2
    for a, b in (
        (y[rows], want[0][rows]),
        (dx[rows], want[1][rows]),
        (dw[others], want[2][others]),
    ):
        assert_close(a, b, UNEVEN.tolerance)


def test_under_vmap_and_with_new_sizes():
    case = dataclasses.replace(UNEVEN, k=128, n=128)
    given = [operands(case, seed) for seed in (0, 1)]
    given[1] = (*given[1][:3], given[1][3][::-1])
    stacked = [jnp.nan_to_num(jnp.stack(a)) for a in zip(*given, strict=True)]
    got = jax.jit(jax.vmap(run))(*stacked)
    for i in range(2):
        check([a[i] for a in got], case, *(a[i] for a in stacked))


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_visits_meet_every_row_once_and_every_tile_or_group(case, empty):
    tm, e = 16, len(case.sizes)
    lists = jax.jit(lambda s: tiles.visits(s, case.t, tm, empty=empty))(jnp.array(case.sizes))
    steps, used = int(lists.steps), int(lists.used[0])
    turn, tile, lo, hi = (np.asarray(a)[:steps] for a in lists[:4])
    groups = np.asarray(lists.groups)
    rows = [
        (t * tm + row, groups[u])
        for u, t, a, b in zip(turn, tile, lo, hi, strict=True)
        for row in range(a, b)
    ]
    assert rows == list(enumerate(np.repeat(np.arange(e), case.sizes)))
    some = np.flatnonzero(case.sizes)
    assert groups[:used].tolist() == (list(range(e)) if empty else some.tolist())
    assert (groups[used:] == e).all() and (np.diff(turn) >= 0).all() and (lo <= hi).all()
    if empty:
        assert set(turn) == set(range(e)) and (np.diff(tile[lo < hi]) >= 0).all()
    else:
        assert set(tile) == set(range(-(-case.t // tm))) and (np.diff(tile) >= 0).all()
        assert (turn[lo == hi] == used).all()


def loss(x, w, sizes, transpose=False):
    return op.product("tpu", transpose, x, w, sizes).astype(jnp.float32).sum()


@pytest.mark.parametrize("transpose", [False, True])
def test_lowers_for_tpu_with_gradients(transpose):
    x, w, dy, sizes = operands(TILED[-1])
    grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=3)
    text = grad.trace(dy if transpose else x, w, sizes, transpose)
    assert text.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


def test_the_layer_lowers_under_vmap_and_checkpoint():
    x, w, _, sizes = operands(TILED[-1])
    weights = w, w, w.swapaxes(1, 2)

    def total(x, *weights):
        run = jax.checkpoint(lambda *a: ffn._ffn("tpu", jax.nn.silu, *a, sizes))
        return run(x, *weights).astype(jnp.float32).sum()

    grad = jax.jit(jax.vmap(jax.grad(total, (0, 1, 2, 3)), (0, None, None, None)))
    text = grad.trace(jnp.stack([x, x]), *weights).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("device", [V5E, V5P, V6E, Tpu()], ids=["v5e", "v5p", "v6e", "default"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_fit(device, dtype):
    item = jnp.dtype(dtype).itemsize
    for t, e in ((1, 1), (37, 3), (4096, 16), (32768, 64), (512, 128)):
        for depth, n in ((128, 128), (4096, 14336), (14336, 4096), (384, 128), (1408, 11008)):
            c = tiles.choose_config(t, e, depth, n, dtype, device)
            assert c.tm % (32 // item) == 0 and c.tn % 128 == 0 and depth % c.tk == 0
            assert tiles.product_bytes(c, depth, item) <= device.vmem * 3 // 4
            assert -(-n // c.tn) % c.cores == 0  # no core has a tile beyond the last
            c = tiles.choose_config(t, e, depth, n, dtype, device, gradient=True)
            assert c.tn % 128 == c.tk % 128 == 0 and -(-depth // c.tk) % c.cores == 0
            assert tiles.gradient_bytes(c, item) <= device.vmem * 3 // 4
    assert tiles.rows_of(32768, 64, device, item) == (256 if device.mxu == 256 else 128)
    assert tiles.rows_of(4096, 64, device, item) == 64


def test_what_a_tpu_cannot_take(monkeypatch):
    case = next(case for case in CASES if case.name == "ragged columns")
    x, w, dy, sizes = operands(case)
    assert not tiles.supports("bfloat16", 4096, 64, 128, 256)
    assert "multiples of 128; got 130 x 70" in tiles.supports("float32", 64, 3, 130, 70)
    assert "float32 and bfloat16; got float16" in tiles.supports("float16", 64, 3, 128, 128)
    assert "whole rows of x and 128 columns" in tiles.supports("float32", 64, 3, 2**20, 128)
    assert "in scalar memory" in tiles.supports("bfloat16", 2**15, 2**16, 128, 128)
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    assert_close(grouped_matmul(x, w, sizes), oracle(x, w, dy, sizes)[0], case.tolerance)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        grouped_matmul(x, w, sizes, implementation="tpu")


def structs(t, e, k, n, dtype):
    struct = lambda *s: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    return struct(t, k), struct(e, k, n), struct(t, n), jax.ShapeDtypeStruct((e,), jnp.int32)


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_compiler_takes_a_large_layer(topology):
    t, e, k, n = 8192, 16, 4096, 14336
    x, w, dy, sizes = structs(t, e, k, n, jnp.bfloat16)
    with scope(topology):
        product = tiles.choose_config(t, e, k, n, jnp.bfloat16, tpu())
        back = tiles.choose_config(t, e, n, k, jnp.bfloat16, tpu())
        dw = tiles.choose_config(t, e, k, n, jnp.bfloat16, tpu(), gradient=True)
        limit = tpu().vmem * 15 // 16
    for said, fn in (
        (tiles.product_bytes(product, k, 2), lambda x, w, dy, s: kernels.matmul(x, w, s, False)),
        (tiles.product_bytes(back, n, 2), lambda x, w, dy, s: kernels.matmul(dy, w, s, True)),
        (tiles.gradient_bytes(dw, 2), lambda x, w, dy, s: gradient(x, dy, s)),
    ):
        used = vmem(compile_for(topology, fn, x, w, dy, sizes))
        assert said / 2 < used <= said * 1.05 <= limit


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_compiler_takes_ragged_rows_and_small_groups(topology):
    def run(x, w, dy, sizes):
        return kernels.matmul(x, w, sizes, False), kernels.gradients(x, dy, w, sizes, False)

    compile_for(topology, run, *structs(1000, 3, 384, 640, jnp.float32))
    compile_for(topology, run, *structs(512, 128, 128, 256, jnp.bfloat16))
    stack = lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype)  # noqa: E731
    compile_for(topology, jax.vmap(run), *map(stack, structs(1, 2, 128, 128, jnp.bfloat16)))
