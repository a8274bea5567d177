"""Block-sparse attention against dense attention: all cases, all implementations that run here."""

import dataclasses
from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import BlockMask, Window, _op, block_sparse_attention, merge_attention
from pallas_kernels._attention_cases import Case
from pallas_kernels._block_sparse_attention import CASES, IMPLEMENTATIONS, OP
from tests.pallas_kernels.attention import assert_like_reference, attention, both, problem_of

RUNS_HERE = [name for name in IMPLEMENTATIONS if name in ("xla", _op.here())]
# Two key-value heads with a mask each, two query heads on each, and no whole number of blocks.
SMALL = Case(
    "small", (20, 30), (4, 2), 2, d=8, block=(8, 8), density=0.6, options=("causal", "offset")
)


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(case, implementation):
    assert_like_reference(attention(implementation), problem_of(case), case.tolerance)


def test_gradients_through_block_mass_alone():
    assert_like_reference(attention(), problem_of(SMALL), 2e-5, (0.0, 0.0, 1.0))


@hypothesis.given(data=st.data())
def test_any_mask_and_offset(data):
    lengths = data.draw(st.sampled_from([SMALL.shape, (33, 17)]))
    case = dataclasses.replace(SMALL, shape=lengths)
    density = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    seed = data.draw(st.integers(0, 2**16))
    problem = problem_of(dataclasses.replace(case, density=density), seed)
    offset = data.draw(st.integers(-lengths[0] - 3, lengths[1] + 3))
    problem = problem._replace(traced={"q_offset": jnp.asarray(offset)})
    assert_like_reference(attention(), problem, 2e-5)


def test_an_offset_an_entry():
    case = dataclasses.replace(SMALL, batch=2)
    problem = problem_of(case)._replace(traced={"q_offset": jnp.array([3, 12])})
    assert_like_reference(attention(), problem, 2e-5)


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    """Rows that list nothing, and one whose only listed block lies in the future."""
    listed = np.zeros((1, 1, 3, 3), bool)
    listed[0, 0, 0, 2] = listed[0, 0, 2, 0] = True
    problem = problem_of(dataclasses.replace(SMALL, shape=(24, 24), mask_heads=1))
    mask = BlockMask.from_dense(listed, (8, 8))
    problem = problem._replace(mask=mask, traced={"q_offset": jnp.asarray(0)})
    (out, lse, mass), gradients = both(attention(), problem, (1.0, 1.0, 1.0))
    assert not out[:, :16].any() and out[:, 16:].all()
    assert (lse[:, :16] == -jnp.inf).all() and jnp.isfinite(lse[:, 16:]).all()
    np.testing.assert_allclose(mass.sum(-1)[0], np.tile([0, 0, 1], (4, 1)), atol=1e-6)
    assert not gradients["q"][:, :16].any() and not gradients["k"][:, 8:].any()
    assert not any(np.isnan(x).any() for x in gradients.values())


def test_large_scores_stay_finite():
    problem = problem_of(SMALL)
    arrays = {n: x * (1.0 if n == "v" else 1e4) for n, x in problem.arrays.items()}
    results, gradients = both(attention(), problem._replace(arrays=arrays), (1.0, 1.0, 1.0))
    assert not any(np.isnan(x).any() for x in (*results, *gradients.values()))
    want = OP.reference(**arrays, block_mask=problem.mask, **problem.traced, **problem.static)
    np.testing.assert_allclose(results[0], want[0], atol=1e-5)


def test_a_new_mask_of_the_same_sizes_never_recompiles():
    @jax.jit
    @partial(chex.assert_max_traces, n=1)
    def run(arrays, mask):
        return block_sparse_attention(**arrays, block_mask=mask, causal=True, return_lse=True)

    for seed in range(3):
        arrays, mask, _, static = problem_of(SMALL, seed)
        out, _ = run(arrays, mask)
        want = OP.reference(**arrays, block_mask=mask, **static)[0]
        np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("masks", [True, False], ids=["masks too", "one mask"])
def test_under_vmap(masks):
    """The output and gradients of it inside vmap; the mask is mapped over, or shared."""
    problems = [problem_of(SMALL, seed) for seed in range(3)]
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    arrays = stack(*(p.arrays for p in problems))
    mask = stack(*(p.mask for p in problems)) if masks else problems[0].mask

    def run(arrays, mask):
        problem = problems[0]._replace(arrays=arrays, mask=mask)
        return both(attention(), problem, (1.0, 0.0, 0.0))

    got = jax.vmap(run, (0, 0 if masks else None))(arrays, mask)
    for i, problem in enumerate(problems):
        want = run(problem.arrays, problem.mask if masks else mask)
        mine = jax.tree.map(lambda x, i=i: x[i], got)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), mine, want)


def test_sharded_over_batch_and_heads(devices):
    case = dataclasses.replace(SMALL, batch=2, heads=(8, 4), mask_heads=4)
    problem = problem_of(case)
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))
    heads = PartitionSpec("data", None, "model")
    lists = PartitionSpec(None, "model")  # the mask is the same for the whole batch

    def local(arrays, mask, traced):
        def loss(arrays):
            out, lse, mass = attention()(**arrays, block_mask=mask, **traced, **problem.static)
            return sum((jnp.where(x == -jnp.inf, 0, x) ** 2).sum() for x in (out, lse, mass)), out

        gradients, out = jax.grad(loss, has_aux=True)(arrays)
        return gradients, out

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(heads, lists, PartitionSpec()), out_specs=(heads, heads)
    )
    want = jax.jit(local)(problem.arrays, problem.mask, problem.traced)
    got = jax.jit(sharded)(problem.arrays, problem.mask, problem.traced)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_two_halves_merge_to_the_whole():
    """Results and gradients, with queries that see nothing in one half, and some in neither."""
    problem = problem_of(dataclasses.replace(SMALL, shape=(24, 24), density=0.7))
    arrays, mask, _, _ = problem
    left = jnp.arange(3) < 1
    block_map = mask.block_map.at[:, :, 1].set(False)
    halves = [BlockMask.from_dense(block_map & side, (8, 8)) for side in (left, ~left)]
    whole = BlockMask.from_dense(block_map, (8, 8))
    run = partial(block_sparse_attention, causal=True, return_lse=True)

    def results(arrays, masks):
        parts = [run(**arrays, block_mask=mask) for mask in masks]
        out, lse = merge_attention(*zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
        return out, jnp.where(lse == -jnp.inf, -7.0, lse)

    def both_ways(arrays, masks):
        got, pull = jax.vjp(lambda arrays: results(arrays, masks), arrays)
        return got, pull(jax.tree.map(jnp.cos, got))

    got, want = (jax.jit(both_ways)(arrays, masks) for masks in (halves, [whole]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
    assert not got[0][0][:, 8:16].any()


def test_types_are_strict_and_results_are_deterministic(strict_promotion):
    arrays, mask, traced, static = problem_of(dataclasses.replace(SMALL, dtype="bfloat16"))
    run = jax.jit(lambda: attention()(**arrays, block_mask=mask, **traced, **static))
    jax.tree.map(np.testing.assert_array_equal, run(), run())
    assert [x.dtype for x in run()] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_memory_grows_with_kept_blocks():
    """Forward and backward, 8 blocks a row: 8 times the tokens need 8 times the memory."""

    def run(q, k, v, dout, mask):
        attend = partial(block_sparse_attention, block_mask=mask, causal=True)
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    def bytes_of(t):
        block_map = jax.ShapeDtypeStruct((1, 2, t // 128, t // 128), bool)
        make = partial(BlockMask.from_dense, block_size=(128, 128), capacity=8)
        x = jax.ShapeDtypeStruct((1, t, 2, 64), jnp.float32)
        compiled = jax.jit(run).lower(x, x, x, x, jax.eval_shape(make, block_map)).compile()
        found = compiled.memory_analysis()
        return found.temp_size_in_bytes, found.output_size_in_bytes

    (temporary, outputs), (temporary_8, outputs_8) = bytes_of(4096), bytes_of(32768)
    assert temporary_8 <= 8 * temporary
    # What is not an output is a few tiles, a number a query, and lists.
    assert temporary <= 0.1 * outputs and temporary_8 <= 0.05 * outputs_8


def test_errors():
    arrays, mask, _, _ = problem_of(SMALL)
    q, k, v = arrays.values()
    call = partial(block_sparse_attention, q, k, v, mask)
    with pytest.raises(ValueError, match="mask is for 20 queries and 30 keys; q and k have 19 and"):
        block_sparse_attention(q[:, 1:], k, v, mask)
    with pytest.raises(ValueError, match="heads of k divide those of q; got"):
        block_sparse_attention(q[:, :, :3], k, v, mask)
    with pytest.raises(ValueError, match=r"q must be \[B, T, H, D\], k and v \[B, S, H_kv, D\]"):
        block_sparse_attention(q, k, v[:, 1:], mask)
    with pytest.raises(ValueError, match="the mask has 2 heads: they must divide the 1 query"):
        block_sparse_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], mask)
    with pytest.raises(ValueError, match="the mask has 2 batch entries; it must have 1 or 1"):
        two = BlockMask.from_dense(jnp.ones((2, 2, 3, 4), bool), (8, 8), shape=(20, 30))
        block_sparse_attention(q, k, v, two)
    with pytest.raises(TypeError, match="one floating dtype; got float32, float32, bfloat16"):
        block_sparse_attention(q, k, v.astype(jnp.bfloat16), mask)
    with pytest.raises(ValueError, match=r"q_offset must be a scalar or of shape \(1,\); got \(2,"):
        call(causal=True, q_offset=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids of the keys must be \[1 or 1, 30\]"):
        call(segment_ids=jnp.zeros((1, 20), jnp.int32))
    with pytest.raises(ValueError, match=r"bias_per_block must be \[1 or 1, 4 or 1, 3, 4\]"):
        call(bias_per_block=jnp.zeros((1, 3, 3, 4)))
    with pytest.raises(ValueError, match="has the implementations"):
        call(implementation="cuda")


def test_full_blocks_and_the_same_by_a_rule_agree():
    """A window that every block satisfies is looked at by block; a mask without it is the same."""
    arrays, _, _, _ = problem_of(dataclasses.replace(SMALL, shape=(24, 24)))
    every = BlockMask.from_dense(jnp.ones((3, 3), bool), (8, 8))
    ruled = BlockMask.from_rule(Window(40, 40), (24, 24), (8, 8))
    run = jax.jit(block_sparse_attention)
    np.testing.assert_array_equal(run(**arrays, block_mask=every), run(**arrays, block_mask=ruled))
