"""Grouped matmul against numpy, `lax.ragged_dot` and a block-diagonal block-sparse product."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.experimental import checkify
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    _grouped_ffn,
    _grouped_matmul,
    _op,
    block_sparse_matmul,
    grouped_ffn,
    grouped_matmul,
    plan,
)
from pallas_kernels import _grouped_matmul_xla as xla
from pallas_kernels._grouped_matmul import CASES, IMPLEMENTATIONS, OP
from tests.pallas_kernels.cases import assert_close
from tests.pallas_kernels.grouped import ffn_operands, ffn_oracle, operands, oracle

RUNS_HERE = [name for name in IMPLEMENTATIONS if name in ("xla", _op.here())]
UNEVEN, BF16 = CASES[1], CASES[-1]
LAYERS = CASES[1:7:2] + CASES[6:]


def with_gradients(fn):
    """Compiled (*arrays, dy, sizes) -> y and the gradients of the arrays."""

    def run(*operands):
        *arrays, dy, sizes = operands
        y, pull = jax.vjp(lambda *a: fn(*a, sizes), *arrays)
        return y, *pull(dy)

    return run


grouped = jax.jit(with_gradients(grouped_matmul))
ffn = jax.jit(with_gradients(grouped_ffn))


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(case, implementation):
    x, w, dy, sizes = operands(case)

    @jax.jit
    def run(x, w, dy, sizes):
        multiply = lambda x, w, t: grouped_matmul(  # noqa: E731
            x, w, sizes, transpose_w=t, implementation=implementation
        )
        y, pull = jax.vjp(lambda x, w: multiply(x, w, False), x, w)
        dx, push = jax.vjp(lambda dy, w: multiply(dy, w, True), dy, w)
        return (y, *pull(dy)), (dx, *push(x))

    (y, dx, dw), (dx_too, y_too, dw_too) = run(x, w, dy, sizes)
    want = oracle(x, w, dy, sizes)
    assert y.dtype == dx.dtype == dw.dtype == jnp.dtype(case.dtype)
    for got, expected in zip((y, dx, dw), want, strict=True):
        assert_close(got, expected, case.tolerance)
    for got, expected in zip((y_too, dx_too, dw_too), want, strict=True):
        assert_close(got, expected, case.tolerance)
    assert_close(OP.reference(x, w, sizes), want[0], case.tolerance)
    turned = w.swapaxes(1, 2)
    assert_close(OP.reference(x, turned, sizes, transpose_w=True), want[0], case.tolerance)
    past = sum(case.sizes)
    assert not np.asarray(y)[past:].any() and not np.asarray(dx)[past:].any()
    assert not np.asarray(dw)[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_the_layer_forward_and_backward(case, implementation):
    *weights, dy, sizes = ffn_operands(case)
    run = with_gradients(lambda *a: grouped_ffn(*a, implementation=implementation))
    want = ffn_oracle(*weights, dy, sizes)
    for got, expected in zip(jax.jit(run)(*weights, dy, sizes), want, strict=True):
        assert got.dtype == jnp.dtype(case.dtype)
        assert_close(got, expected, 3 * case.tolerance)
    assert_close(_grouped_ffn.reference(*weights, sizes), want[0], 3 * case.tolerance)


def test_the_layer_by_three_products_is_the_same():
    *weights, dy, sizes = ffn_operands(UNEVEN)
    parts = _grouped_ffn.three_products("xla")
    y, g, u = parts.keeping(*weights, sizes, jax.nn.silu)
    x, *matrices = weights
    got = y, *parts.gradients(x, dy, g, u, *matrices, sizes, jax.nn.silu)
    for a, b in zip(got, ffn_oracle(*weights, dy, sizes), strict=True):
        assert_close(a, b, 3 * UNEVEN.tolerance)


def test_the_layer_without_differentiation():
    *weights, _, sizes = ffn_operands(UNEVEN)
    want = _grouped_ffn.reference(*weights, sizes, activation=jnp.tanh)
    got = jax.jit(lambda *a: grouped_ffn(*a, sizes, activation=jnp.tanh))(*weights)
    assert_close(got, want, 3 * UNEVEN.tolerance)


SHAPE = 4, 24, 8, 16  # groups, rows, K, N


@given(st.data())
def test_random_sizes_like_ragged_dot(data):
    e, t, k, n = SHAPE
    cuts = sorted(data.draw(st.lists(st.integers(0, t), min_size=e, max_size=e)))
    sizes = jnp.diff(jnp.array([0, *cuts]))
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((t, k), (e, k, n), (t, n))
    )
    for a, b in zip(grouped(x, w, dy, sizes), ragged(x, w, dy, sizes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


ragged = jax.jit(with_gradients(lax.ragged_dot))


def test_experts_are_a_block_diagonal_weight():
    # Tokens of an expert fill their own columns of a wide x, so that one product does all experts.
    (e, size, k, n), rng = (3, 20, 128, 128), np.random.default_rng(0)
    x, w = rng.standard_normal((e, size, k)), rng.standard_normal((e, k, n))
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    places = jnp.arange(e)
    topology = plan(places, places, (e, e), fan_in=1)
    sizes, own = jnp.array([20, 7, 0]), jnp.arange(size) < jnp.array([20, 7, 0])[:, None]

    def by_blocks(x, w):
        wide = jnp.einsum("esk,ef->esfk", x, jnp.eye(e)).reshape(e * size, e * k)
        y = block_sparse_matmul(wide, w, topology).reshape(e, size, e, n)
        return jnp.einsum("esfn,ef->esn", y, jnp.eye(e))[own]  # rows of each expert, sorted

    def by_groups(x, w):
        return grouped_matmul(x[own], w, sizes)

    (y, pull), (want, pull_too) = jax.vjp(by_groups, x, w), jax.vjp(by_blocks, x, w)
    assert_close(y, want, 1e-5)
    for a, b in zip(pull(want), pull_too(want), strict=True):
        assert_close(a, b, 1e-5)


def test_new_sizes_never_recompile():
    x, w, dy, _ = operands(UNEVEN)
    x, dy = jnp.nan_to_num(x), jnp.nan_to_num(dy)
    run = jax.jit(chex.assert_max_traces(n=1)(with_gradients(grouped_matmul)))
    for sizes in ([0, 0, 312, 0, 0, 0], [0] * 6, [52] * 6, [1, 2, 3, 4, 5, 6]):
        got = run(x, w, dy, jnp.array(sizes, jnp.int32))
        for a, b in zip(got, oracle(x, w, dy, sizes), strict=True):
            assert_close(a, b, UNEVEN.tolerance)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays_in_its_group(bad):
    x, w, dy, sizes = operands(UNEVEN)  # NaN past the sum
    want = oracle(x, w, dy, sizes)
    poisoned = grouped(x.at[40].set(bad), w.at[4].set(bad), dy.at[41].set(bad), sizes)
    y, dx, dw = (np.asarray(a) for a in poisoned)  # rows 37 to 166 are group 2, 168 on are group 4
    rows = np.r_[0:40, 42:168, 232:312]
    assert_close(y[rows], want[0][rows], 1e-5)
    assert_close(dx[rows], want[1][rows], 1e-5)
    others = np.array([0, 1, 3, 4, 5])
    assert_close(dw[others], want[2][others], 1e-5)
    assert not np.isfinite(dw[2]).all()
    *weights, dy, sizes = ffn_operands(UNEVEN)
    clean = ffn_oracle(*weights, dy, sizes)
    found = ffn(weights[0].at[40].set(bad), *weights[1:], dy.at[41].set(bad), sizes)
    rows = np.r_[0:40, 42:312]
    for a, b in zip(found[:2], clean[:2], strict=True):
        assert_close(np.asarray(a)[rows], b[rows], 3e-5)
    for a, b in zip(found[2:], clean[2:], strict=True):
        assert_close(np.asarray(a)[others], b[others], 3e-5)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, 0, None), (None, 0, 0, None)])
def test_under_vmap(axes):
    given = [operands(UNEVEN, seed) for seed in (0, 1)]
    given[1] = (*given[1][:3], given[1][3][::-1])
    stacked = [
        parts[0] if axis is None else jnp.nan_to_num(jnp.stack(parts))
        for parts, axis in zip(zip(*given, strict=True), axes, strict=True)
    ]
    got = jax.jit(jax.vmap(with_gradients(grouped_matmul), axes))(*stacked)
    for i in range(2):
        alone = [a if axis is None else a[i] for a, axis in zip(stacked, axes, strict=True)]
        for a, b in zip(got, oracle(*alone), strict=True):
            assert_close(a[i], b, UNEVEN.tolerance)


def test_the_layer_under_vmap_and_scan():
    *weights, dy, sizes = ffn_operands(CASES[6])
    xs = jnp.stack([weights[0], 2 * weights[0]])
    got = jax.jit(jax.vmap(ffn, (0, None, None, None, None, None)))(xs, *weights[1:], dy, sizes)
    for i in range(2):
        for a, b in zip(got, ffn(xs[i], *weights[1:], dy, sizes), strict=True):
            assert_close(a[i], b, 1e-6)

    def total(x, matrices):
        layer = jax.checkpoint(lambda x, m: (x + grouped_ffn(x, *m, sizes), None))
        return (jnp.nan_to_num(lax.scan(layer, x, matrices)[0]) ** 2).sum()

    layers = [jnp.stack([w, w]) for w in weights[1:]]
    slopes = jax.jit(jax.grad(total, 1))(jnp.nan_to_num(weights[0]), layers)
    assert all(np.isfinite(a).all() and np.abs(a).max() > 0 for a in slopes)


def test_rows_shared_among_devices(devices):
    # Each device has rows of its own and all matrices, whose gradients are summed.
    x, w, dy, _ = operands(CASES[0])
    sizes = jnp.array([[100, 0, 8, 20], [3, 60, 0, 65]])
    shared = over_two(devices, (P("a"), P(), P("a"), P("a")), (P("a"), P("a"), P()))
    y, dx, dw = shared(lambda x, w, dy, s: with_gradients(grouped_matmul)(x, w, dy, s[0]))(
        x, w, dy, sizes
    )
    parts = zip(*(oracle(a, w, b, s) for a, b, s in halves(x, dy, sizes)), strict=True)
    for a, (one, two), join in zip((y, dx, dw), parts, (stack, stack, np.add), strict=True):
        assert_close(a, join(one, two), 1e-5)


def test_matrices_shared_among_devices(devices):
    # Each device has matrices of its own and all rows, whose gradients are summed.
    x, w, dy, _ = operands(CASES[0])
    sizes = jnp.array([[100, 28], [30, 90]])

    def run(x, w, dy, s):
        y, dx, dw = with_gradients(grouped_matmul)(x, w, lax.pcast(dy, "a", to="varying"), s[0])
        return y[None], dx, dw

    shared = over_two(devices, (P(), P("a"), P(), P("a")), (P("a"), P(), P("a")))
    y, dx, dw = shared(run)(x, w, dy, sizes)
    parts = zip(*(oracle(x, b, dy, s) for b, _, s in halves(w, w, sizes)), strict=True)
    joins = (lambda *a: np.stack(a), np.add, stack)
    for a, (one, two), join in zip((y, dx, dw), parts, joins, strict=True):
        assert_close(a, join(one, two), 1e-5)


def over_two(devices, inside, outside):
    mesh = Mesh(np.array(devices[:2]), ("a",))
    return lambda fn: jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=inside, out_specs=outside))


def halves(a, b, sizes):
    return zip(np.split(a, 2), np.split(b, 2), sizes, strict=True)


def stack(one, two):
    return np.concatenate([one, two])


def test_dtypes_promote_and_sums_are_wide():
    x, w, dy, sizes = operands(BF16)
    y = grouped_matmul(x.astype(jnp.float32), w, sizes)
    assert y.dtype == jnp.float32
    with jax.numpy_dtype_promotion("strict"):
        for a in (*with_gradients(grouped_matmul)(x, w, dy, sizes),):
            assert a.dtype == jnp.bfloat16
    ones = jnp.ones((600, 4), jnp.bfloat16)  # 600 ones, and 256 + 1 is not a bfloat16
    dw = jax.grad(lambda w: grouped_matmul(ones, w, jnp.array([600])).sum().astype(jnp.float32))
    assert float(dw(jnp.ones((1, 4, 4), jnp.bfloat16))[0, 0, 0]) == 600


def test_nothing_to_multiply():
    for t, e, k, n in ((0, 2, 4, 4), (4, 0, 4, 4), (4, 2, 0, 4), (4, 2, 4, 0)):
        x, w, sizes = jnp.ones((t, k)), jnp.ones((e, k, n)), jnp.zeros(e, jnp.int32)
        y, dx, dw = with_gradients(grouped_matmul)(x, w, jnp.ones((t, n)), sizes)
        assert y.shape == (t, n) and not y.any() and not dx.any() and dw.shape == w.shape
        assert grouped_ffn(x, w, w, w.swapaxes(1, 2), sizes).shape == x.shape


def test_tiles_cover_every_group_once():
    cut = jax.jit(xla.tiles_of, static_argnums=(1, 2))
    for case in (UNEVEN, CASES[3], CASES[6]):
        sizes = xla.tile_sizes(case.t, len(case.sizes))
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] <= case.t and len(sizes) <= 12
        tiles = cut(jnp.array(case.sizes, jnp.int32), case.t, sizes)
        tiles = jax.tree.map(np.asarray, tiles)
        seen = []
        for kind, size in enumerate(sizes):
            for i in range(int(tiles.start[kind]), int(tiles.start[kind + 1])):
                begin, end = int(tiles.begin[i]), int(tiles.end[i])
                assert 0 < end - begin <= size
                seen += [(row, int(tiles.group[i])) for row in range(begin, end)]
        owner = np.repeat(np.arange(len(case.sizes)), case.sizes)
        assert sorted(seen) == list(enumerate(owner))
    assert xla.tile_sizes(4096, 16) == (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def test_errors():
    x, w, _, sizes = operands(UNEVEN)
    with pytest.raises(ValueError, match=r"x must be \[T, K\] and w \[E, K, N\] of one K"):
        grouped_matmul(x[:, 1:], w, sizes)
    with pytest.raises(ValueError, match=r"w \[E, N, K\] of one K"):
        grouped_matmul(x, w, sizes, transpose_w=True)
    with pytest.raises(ValueError, match=r"one size a matrix of w, shape \(6,\); got \(5,\)"):
        grouped_matmul(x, w, sizes[1:])
    with pytest.raises(TypeError, match="group_sizes must be integers; got float32"):
        grouped_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"group_sizes\[2\] is -1; a group has 0 rows or more"):
        grouped_matmul(x, w, sizes.at[2].set(-1))
    with pytest.raises(ValueError, match="have a sum of 313, and x has 312 rows"):
        grouped_matmul(x, w, sizes.at[0].add(13))
    with pytest.raises(ValueError, match="has the implementations"):
        grouped_matmul(x, w, sizes, implementation="gpu")
    with pytest.raises(ValueError, match=r"down \[E, H, K\]; got .*\(6, 256, 128\)"):
        grouped_ffn(x, w, w, w, sizes)
    for fn in (grouped_matmul, lambda x, w, s: grouped_ffn(x, w, w, w.swapaxes(1, 2), s)):
        checked = jax.jit(checkify.checkify(fn, errors=checkify.user_checks))
        assert checked(x, w, sizes)[0].get() is None
        assert "a group has -1 rows" in checked(x, w, sizes.at[2].set(-1))[0].get()
        assert "groups have 313 rows" in checked(x, w, sizes.at[0].add(13))[0].get()
    jax.jit(grouped_matmul)(x, w, sizes.at[0].add(1000))  # without checkify nothing is done
    assert _grouped_matmul.check_group_sizes(sizes, 312) is None
