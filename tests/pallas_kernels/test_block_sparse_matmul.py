"""Block-sparse matmul against the dense product: all cases, all implementations that run here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import Topology, _op, block_sparse_matmul, check_topology, plan, todense
from pallas_kernels._block_sparse_matmul import CASES, IMPLEMENTATIONS, OP
from pallas_kernels._topology import visits
from tests.pallas_kernels.cases import assert_close, operands, oracle

RUNS_HERE = [name for name in IMPLEMENTATIONS if name in ("xla", _op.here())]
SMALL = next(case for case in CASES if case.name == "unbalanced, empty lines, spare slots")


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(case, implementation):
    x, values, dy, topology = operands(case)

    @jax.jit
    def run(x, values, dy, topology):
        multiply = lambda x, v: block_sparse_matmul(x, v, topology, implementation=implementation)  # noqa: E731
        y, pull = jax.vjp(multiply, x, values)
        transposed = lambda a, v: block_sparse_matmul(  # noqa: E731
            a, v, topology, transpose=True, implementation=implementation
        )
        dx, push = jax.vjp(transposed, dy, values)
        return y, *pull(dy), dx, *push(x)

    y, dx, dvalues, dx_too, y_too, dvalues_too = run(x, values, dy, topology)
    dense, *want = oracle(x, values, dy, topology)
    assert y.dtype == dx.dtype == dvalues.dtype == jnp.dtype(case.dtype)
    for got, expected in zip((y, dx, dvalues), want, strict=True):
        assert_close(got, expected, case.tolerance)
    for got, expected in zip((y_too, dx_too, dvalues_too), want, strict=True):
        assert_close(got, expected, case.tolerance)
    assert (np.asarray(dvalues)[~np.asarray(topology.used)] == 0).all()
    np.testing.assert_array_equal(np.asarray(todense(values, topology), np.float32), dense)
    assert_close(OP.reference(x, values, topology), want[0], case.tolerance)


def test_a_new_topology_of_the_same_size_never_recompiles():
    case = CASES[0]
    run = jax.jit(block_sparse_matmul)
    for seed in range(3):
        x, values, dy, topology = operands(case, seed)
        assert_close(run(x, values, topology), oracle(x, values, dy, topology)[1], case.tolerance)
    assert run._cache_size() == 1


@pytest.mark.parametrize("fan_in", [True, False])
def test_under_vmap_over_x_and_over_weights(fan_in):
    case = CASES[0] if fan_in else SMALL
    xs, vs, dys, topologies = (
        jax.tree.map(lambda *a: jnp.stack(a), *parts)
        for parts in zip(*(operands(case, seed) for seed in (0, 0)), strict=True)
    )
    vs = vs.at[1].multiply(2.0)

    def run(x, v, topology, dy):
        y, pull = jax.vjp(lambda x, v: block_sparse_matmul(x, v, topology), x, v)
        return y, *pull(dy)

    got = jax.jit(jax.vmap(run))(xs, vs, topologies, dys)
    for i in range(2):
        topology = jax.tree.map(lambda a, i=i: a[i], topologies)
        _, *want = oracle(xs[i], vs[i], dys[i], topology)
        for a, b in zip(got, want, strict=True):
            assert_close(a[i], b, case.tolerance)


def test_leading_axes_of_x_and_a_wider_x():
    x, values, _, topology = operands(CASES[0])
    y = block_sparse_matmul(x.reshape(2, 128, -1), values.astype(jnp.bfloat16), topology)
    assert y.shape == (2, 128, 768) and y.dtype == jnp.float32
    assert block_sparse_matmul(x[0], values, topology).shape == (768,)
    assert block_sparse_matmul(x[:0], values, topology).shape == (0, 768)


def test_visits_meet_every_block_once_and_every_output():
    for case in (CASES[0], SMALL):
        topology = operands(case)[3]
        for transpose in (False, True):
            for group in (1, 3):
                v = jax.jit(visits, static_argnums=1, static_argnames="transpose")(
                    topology, group, transpose=transpose
                )
                live, steps = np.asarray(v.live), int(v.steps)
                assert sorted(np.asarray(v.slot)[live]) == list(np.flatnonzero(topology.used))
                assert not live[steps:].any()
                out = np.asarray(v.out)
                lines = topology.rows if transpose else topology.cols
                of_slot = np.repeat(out[:, None], group, 1)[live]
                np.testing.assert_array_equal(of_slot, np.asarray(lines)[np.asarray(v.slot)[live]])
                assert set(out[:steps]) == set(range(topology.grid[0 if transpose else 1]))
                assert (np.diff(out) >= 0).all()


def test_a_plan_is_the_same_on_stacked_weights():
    rows, cols = jnp.array([[0, 2, 1], [1, 9, 0]]), jnp.array([[1, 0, 1], [0, 0, 1]])
    stacked = plan(rows, cols, (3, 2))
    for i in range(2):
        alone = plan(rows[i], cols[i], (3, 2))
        jax.tree.map(
            np.testing.assert_array_equal, alone, jax.tree.map(lambda a, i=i: a[i], stacked)
        )
    assert stacked.count.tolist() == [3, 2] and stacked.used.tolist()[1] == [True, False, True]
    assert isinstance(stacked, Topology) and stacked.grid == (3, 2)


def test_errors():
    x, values, _, topology = operands(CASES[0])
    with pytest.raises(ValueError, match=r"last axis of x must be 512; got \(256, 511\)"):
        block_sparse_matmul(x[:, :-1], values, topology)
    with pytest.raises(ValueError, match=r"values must be \[S, bk, bn\]"):
        block_sparse_matmul(x, values[:-1], topology)
    with pytest.raises(ValueError, match="has the implementations"):
        block_sparse_matmul(x, values, topology, implementation="cuda")
    with pytest.raises(ValueError, match=r"fan_in=2 in 3 block columns takes 6 slots; got 5"):
        plan(jnp.zeros(5, int), jnp.zeros(5, int), (4, 3), fan_in=2)


def test_a_block_stored_twice_is_refused():
    for case in CASES:
        check_topology(operands(case)[3])
    twice = plan(jnp.array([1, 0, 1, 9]), jnp.array([2, 0, 2, 0]), (2, 3))
    with pytest.raises(ValueError, match=r"slots \[0, 2\] all store the block at row 1, column 2"):
        check_topology(twice)
    apart = plan(jnp.array([0, 1]), jnp.array([1, 0]), (2, 2), fan_in=1)
    with pytest.raises(ValueError, match="fan_in=1 says that column c owns the slots"):
        check_topology(apart)
    checked = jax.jit(checkify.checkify(check_topology, errors=checkify.user_checks))
    assert "two slots store block 5" in checked(twice)[0].get()
    assert "outside the column" in checked(apart)[0].get()
    jax.jit(check_topology)(twice)  # without checkify nothing is done
    multiply = jax.jit(checkify.checkify(block_sparse_matmul, errors=checkify.user_checks))
    x, values = jnp.ones((2, 4)), jnp.ones((4, 2, 2))
    assert "two slots store block 5" in multiply(x, values, twice)[0].get()


@pytest.mark.parametrize("fan_in", [True, False])
def test_bf16_under_strict_promotion(fan_in):
    case = CASES[0] if fan_in else SMALL
    x, values, dy, topology = operands(case)
    x, values, dy = (a.astype(jnp.bfloat16) for a in (x, values, dy))
    with jax.numpy_dtype_promotion("strict"):
        y, pull = jax.vjp(lambda x, v: block_sparse_matmul(x, v, topology), x, values)
        got = y, *pull(dy)
    _, *want = oracle(x, values, dy, topology)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_close(a, b, 1e-2)
