"""The gated product against the dense one: all cases, XLA here and TPU in interpret mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import _block_sparse_gated_tpu as kernels
from pallas_kernels import _block_sparse_gated_xla as xla
from pallas_kernels import _block_sparse_tpu as tiles
from pallas_kernels import _op, block_sparse_gated, block_sparse_matmul, plan
from pallas_kernels._block_sparse_gated import CASES, IMPLEMENTATIONS, OP, _gated
from pallas_kernels._compat import races_found
from tests.pallas_kernels.cases import assert_close, operands
from tests.pallas_kernels.tpu import interpret

RUNS_HERE = [name for name in IMPLEMENTATIONS if name in ("xla", _op.here())]
SMALL = next(case for case in CASES if case.name == "unbalanced, empty lines, spare slots")


def both(case, seed=0):
    """x, gate, up, dy; gate and up store other blocks, and other numbers of them where they can."""
    x, values, dy, topology = operands(case, seed)
    if case.fan_in:
        case = dataclasses.replace(case, density=max(case.density / 2, 1 / case.grid[0]))
    _, others, _, other = operands(case, seed + 1)
    return x, (values, topology), (others, other), dy


def wanted(x, gate, up, dy, activation=jax.nn.silu):
    """y, dx and both gradients of values through dense weights."""

    def run(x, v, w):
        return OP.reference(x, v, gate[1], w, up[1], activation=activation)

    y, pull = jax.vjp(run, x, gate[0], up[0])
    return y, *pull(dy)


def check(got, want, case, gate, up):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.dtype(case.dtype)
        assert_close(a, b, case.tolerance)
    for slopes, (_, topology) in zip(got[2:], (gate, up), strict=True):
        assert (np.asarray(slopes)[~np.asarray(topology.used)] == 0).all()


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(case, implementation):
    x, gate, up, dy = both(case)

    @jax.jit
    def run(x, gate, up, dy):
        multiply = lambda x, v, w: block_sparse_gated(  # noqa: E731
            x, v, gate[1], w, up[1], implementation=implementation
        )
        y, pull = jax.vjp(multiply, x, gate[0], up[0])
        return multiply(x, gate[0], up[0]), (y, *pull(dy))

    alone, got = run(x, gate, up, dy)
    want = wanted(x, gate, up, dy)
    check(got, want, case, gate, up)
    assert_close(alone, want[0], case.tolerance)


@pytest.mark.parametrize("fan_in", [True, False])
def test_under_vmap_over_x_and_over_weights(fan_in):
    case = CASES[0] if fan_in else SMALL
    alone = [(x * (i + 1), gate, up, dy) for i, (x, gate, up, dy) in enumerate([both(case)] * 2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *alone)

    def run(x, gate, up, dy):
        multiply = lambda x, v, w: block_sparse_gated(x, v, gate[1], w, up[1])  # noqa: E731
        y, pull = jax.vjp(multiply, x, gate[0], up[0])
        return y, *pull(dy)

    got = jax.jit(jax.vmap(run))(*stacked)
    for i, (x, gate, up, dy) in enumerate(alone):
        check([a[i] for a in got], wanted(x, gate, up, dy), case, gate, up)


def test_columns_of_more_blocks_than_a_turn_takes():
    case = dataclasses.replace(CASES[0], m=8, grid=(34, 2), block=(4, 4))
    x, gate, up, dy = both(case)
    assert not xla.supports(gate[1], up[1]) and xla.supports(up[1], up[1])
    multiply = lambda x, v, w: block_sparse_gated(x, v, gate[1], w, up[1])  # noqa: E731
    y, pull = jax.vjp(multiply, x, gate[0], up[0])
    check((y, *pull(dy)), wanted(x, gate, up, dy), case, gate, up)


def test_eight_bit_values_and_strict_promotion():
    case = dataclasses.replace(CASES[0], dtype="bfloat16", tolerance=1e-2)
    x, gate, up, dy = both(case)
    x, dy = x / 8, dy / 8  # so that gradients are within 448, the largest number
    gate, up = ((v.astype(jnp.float8_e4m3fn), t) for v, t in (gate, up))
    with jax.numpy_dtype_promotion("strict"):
        multiply = lambda x, v, w: block_sparse_gated(x, v, gate[1], w, up[1])  # noqa: E731
        y, pull = jax.vjp(multiply, x, gate[0], up[0])
        dx, dgate, dup = pull(dy)
    want = wanted(x, *((v.astype(jnp.bfloat16), t) for v, t in (gate, up)), dy)
    assert_close(y, want[0], 1e-2)
    assert_close(dx, want[1], 1e-2)
    for a, b in zip((dgate, dup), want[2:], strict=True):
        assert a.dtype == jnp.float8_e4m3fn
        assert_close(a, b, 2**-4)  # 4 bits of mantissa


def test_what_is_stored_nowhere_is_zero_before_the_activation():
    x, (values, topology), _, _ = both(dataclasses.replace(CASES[0], m=2))
    none = values[:0], plan(jnp.zeros(0, int), jnp.zeros(0, int), topology.grid)
    y = block_sparse_gated(x, *none, values, topology, activation=jnp.cos)
    assert_close(y, block_sparse_matmul(x, values, topology), 1e-6)
    assert not block_sparse_gated(x, values, topology, *none).any()
    assert block_sparse_gated(x[:0], values, topology, values, topology).shape == (0, 768)


def test_errors():
    x, (values, topology), (others, other), _ = both(CASES[0])
    with pytest.raises(ValueError, match=r"last axis of x must be 512; got \(256, 511\)"):
        block_sparse_gated(x[:, :-1], values, topology, others, other)
    with pytest.raises(ValueError, match=r"up has 8 x 6 of 64 x 128; they must be alike"):
        wide = plan(jnp.array([0]), jnp.array([0]), (8, 6))
        block_sparse_gated(x, values, topology, values[:1, :64], wide)
    with pytest.raises(TypeError, match="one dtype; got float32 and bfloat16"):
        block_sparse_gated(x, values, topology, others.astype(jnp.bfloat16), other)
    twice = plan(jnp.zeros(2, int), jnp.zeros(2, int), topology.grid)
    checked = jax.jit(checkify.checkify(block_sparse_gated, errors=checkify.user_checks))
    assert "two slots" in checked(x, values, topology, values[:2], twice)[0].get()


# TPU, in interpret mode with a search for races.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tpu_forward(case):
    if case.name == "nothing stored":
        case = dataclasses.replace(case, density=0.2)  # of one weight nothing but the empty lines
    x, gate, up, dy = both(case)
    y = jax.jit(lambda *a: kernels.forward(*a, jax.nn.silu, interpret=interpret()))(x, gate, up)
    assert not races_found()
    assert y.dtype == jnp.dtype(case.dtype)
    assert_close(y, wanted(x, gate, up, dy)[0], case.tolerance)


@pytest.mark.parametrize(("order", "cores", "merge"), [("on_wait", 2, True), ("eager", 1, False)])
def test_tpu_panels_cores_and_orders_of_copies(order, cores, merge):
    case = dataclasses.replace(SMALL, m=64, grid=(4, 3), density=0.6, spare=2)
    x, gate, up, dy = both(case)
    mode = interpret(dma_execution_mode=order, num_cores_or_threads=cores)
    config = tiles.Config(16, 2, merge, cores)
    y = jax.jit(lambda *a: kernels.forward(*a, jax.nn.gelu, config=config, interpret=mode))(
        x, gate, up
    )
    assert not races_found()
    assert_close(y, wanted(x, gate, up, dy, jax.nn.gelu)[0], case.tolerance)


def test_tpu_lists_visit_the_columns_of_both_in_turn():
    _, (_, gate), (_, up), _ = both(SMALL)
    for group in (1, 3):
        v = jax.jit(kernels.gated_visits, static_argnums=2)(gate, up, group)
        live, out = np.asarray(v.live), np.asarray(v.out)
        assert set(out[: int(v.steps)]) == set(range(2 * gate.grid[1]))
        assert (np.diff(out) >= 0).all() and not live[int(v.steps) :].any()
        for which, topology in enumerate((gate, up)):
            mine = live & (out % 2 == which)[:, None]
            slots = np.asarray(v.slot)[mine]
            assert sorted(slots) == list(np.flatnonzero(topology.used))
            column = np.repeat(out[:, None] // 2, group, 1)[mine]
            np.testing.assert_array_equal(column, np.asarray(topology.cols)[slots])
            np.testing.assert_array_equal(
                np.asarray(v.source)[mine], np.asarray(topology.rows)[slots]
            )


@pytest.mark.parametrize("over", [(0, None, None), (0, 0, None), (0, 0, 0)])
def test_tpu_under_vmap(over):
    case = dataclasses.replace(SMALL, m=16, grid=(2, 2), spare=1)
    alone = [(x * (i + 1), gate, up) for i, (x, gate, up, _) in enumerate([both(case)] * 2)]
    stacked = [
        part[0] if axis is None else jax.tree.map(lambda *a: jnp.stack(a), *part)
        for part, axis in zip(zip(*alone, strict=True), over, strict=True)
    ]
    run = lambda *a: kernels.forward(*a, jax.nn.silu, interpret=interpret())  # noqa: E731
    got = jax.jit(jax.vmap(run, over))(*stacked)
    assert not races_found()
    for i, (x, gate, up) in enumerate(alone):
        want = OP.reference(x, *gate, *up)
        assert_close(got[i], want, case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lowers_for_tpu_with_gradients(case):
    x, gate, up, _ = both(case)

    def loss(x, v, w):
        return _gated("tpu", jax.nn.silu, x, v, gate[1], w, up[1]).sum()

    for function, kernel_calls in ((loss, 1), (jax.value_and_grad(loss, (0, 1, 2)), 6)):
        lowered = jax.jit(function).trace(x, gate[0], up[0]).lower(lowering_platforms=("tpu",))
        assert lowered.as_text().count("tpu_custom_call") == kernel_calls


def test_blocks_that_a_tpu_cannot_tile(monkeypatch):
    case = dataclasses.replace(CASES[0], block=(64, 128), m=8)
    x, gate, up, dy = both(case)
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    y = block_sparse_gated(x, *gate, *up)  # by the XLA form
    assert_close(y, wanted(x, gate, up, dy)[0], case.tolerance)
    with pytest.raises(NotImplementedError, match=r"block_sparse_gated: .* multiples of 128"):
        block_sparse_gated(x, *gate, *up, implementation="tpu")


def test_what_does_not_fit_a_tpu(monkeypatch):
    x, gate, up, dy = both(CASES[0])
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    monkeypatch.setattr(tiles, "MOST_PREFETCHED", 90)  # enough for each alone
    sizes = x.shape[0], gate[1], (128, 128), x.dtype
    assert not tiles.too_large(*sizes) and tiles.too_large(*sizes, up[1])
    with pytest.warns(UserWarning, match="implementation='xla' is taken here, .*scalar memory"):
        y = block_sparse_gated(x, *gate, *up)
    assert_close(y, wanted(x, gate, up, dy)[0], CASES[0].tolerance)
