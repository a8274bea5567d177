"""The TPU kernels of block-sparse attention in interpret mode, looking for races, and lowered."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import BlockMask, Window, _op, block_sparse_attention
from pallas_kernels import _attention_tiles_tpu as tiles
from pallas_kernels import _block_sparse_attention as op
from pallas_kernels import _block_sparse_attention_backward_tpu as kernels
from pallas_kernels._attention_cases import Case, reference
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_attention import CASES
from pallas_kernels._compat import Tpu, races_found
from tests.pallas_kernels.attention import assert_like_reference, attention, both, error, problem_of
from tests.pallas_kernels.tpu import interpret

SMALL = Case("small", (256, 384), (2, 1), 1, density=0.7, options=("causal", "offset"))
V5E, V5P = Tpu(128 * 2**20, 128), Tpu(64 * 2**20, 128, 2)


@pytest.fixture
def interpreted(monkeypatch):
    """Let `implementation="tpu"` run here; returns what changes the tiles, and the mode."""

    def use(mode=None, **changes):
        mode = mode or interpret()

        def changed(make):
            return lambda *a: dataclasses.replace(
                (plan := make(*a)), **{k: v for k, v in changes.items() if hasattr(plan, k)}
            )

        def rows(form, q, k, lists, kernel):
            return changed(tiles.plan_rows)(form, q, k, lists, Tpu(), kernel)

        def forward(form, q, k, v, lists, extras):
            plan = rows(form, q, k, lists, "forward")
            return kernels.forward(form, q, k, v, lists, extras, plan=plan, interpret=mode)

        def backward(form, q, k, v, lse, dout, delta, lists, cols, extras):
            cut = tiles.plan_cols(form, q, k, cols, Tpu())
            by_key = {k: v for k, v in changes.items() if k != "resident"}
            plans = rows(form, q, k, lists, "dq"), dataclasses.replace(cut, **by_key)
            arrays = q, k, v, lse, dout, delta
            return kernels.backward(form, *arrays, lists, cols, extras, plans=plans, interpret=mode)

        def mass(form, q, k, lse, lists, extras):
            plan = rows(form, q, k, lists, "mass")
            return kernels.mass(form, q, k, lse, lists, extras, plan=plan, interpret=mode)

        implementation = op.Implementation(forward, backward, mass)
        monkeypatch.setitem(op.IMPLEMENTATIONS, "tpu", implementation)
        monkeypatch.setattr(_op, "here", lambda: "tpu")

    return use


def check(problem, tolerance, weights=(1.0, 1.0, 0.0)):
    """Results and gradients are those of the dense reference, and no copy raced."""
    attend = partial(attention("tpu"))  # a new one, for tiles change what is compiled
    assert_like_reference(attend, problem, tolerance, weights)
    assert not races_found()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case, interpreted):
    number = CASES.index(case)
    interpreted(members=2, resident=number % 2 == 0, cores=1 + number // 2 % 2)
    check(problem_of(case), case.tolerance)


@pytest.mark.parametrize("name", ["blocks of 64, ragged", "empty rows and columns"])
def test_block_mass(name, interpreted):
    case = next(case for case in CASES if case.name == name)
    interpreted(members=2, resident=case.block == (64, 64))
    problem = problem_of(case)
    attend = partial(attention("tpu"))
    got = jax.jit(lambda arrays: attend(block_mask=problem.mask, **arrays, **problem.static))(
        problem.arrays
    )
    assert not races_found()
    want = both(reference, problem)[0][2]
    assert error(np.asarray(got[2]), np.asarray(want)) <= case.tolerance


@pytest.mark.parametrize("resident", [True, False])
def test_copies_that_run_at_once_and_two_threads(resident, interpreted):
    mode = interpret(dma_execution_mode="eager", num_cores_or_threads=2)
    interpreted(mode, members=2, resident=resident, cores=2)
    check(problem_of(SMALL), SMALL.tolerance)


def test_long_lists_take_full_and_smaller_tiles(interpreted):
    """9 blocks in tiles of 4: two full ones, and one of 2 that is half empty."""
    interpreted(members=4, resident=False)
    case = dataclasses.replace(SMALL, shape=(64, 576), block=(64, 64), density=1.0, options=())
    check(problem_of(case), case.tolerance)


@pytest.mark.parametrize("resident", [True, False])
def test_blocks_that_nothing_lists_do_not_matter(resident, interpreted):
    interpreted(members=2, resident=resident)
    problem = problem_of(dataclasses.replace(SMALL, mask_heads=2, options=()))
    listed = np.ones((1, 2, 2, 3), bool)
    listed[..., 1] = False
    listed[:, 1, 1] = False
    problem = problem._replace(mask=BlockMask.from_dense(listed, (128, 128)))
    arrays = dict(problem.arrays)
    want = both(reference, problem)[0][0]
    for name in "kv":
        arrays[name] = arrays[name].at[:, 128:256].set(jnp.nan)
    got = jax.jit(partial(block_sparse_attention, implementation="tpu"))(
        **arrays, block_mask=problem.mask
    )
    assert error(np.asarray(got), np.asarray(want)) <= 2e-5


def test_under_vmap_over_all_but_the_mask(interpreted):
    interpreted(members=2)
    problem = problem_of(dataclasses.replace(SMALL, shape=(128, 256)))
    arrays = {name: jnp.stack([x, 2 * x]) for name, x in problem.arrays.items()}
    offsets = jnp.array([0, 128])

    def run(arrays, offset):
        return block_sparse_attention(
            **arrays, block_mask=problem.mask, causal=True, q_offset=offset, implementation="tpu"
        )

    got = jax.jit(jax.vmap(run))(arrays, offsets)
    assert not races_found()
    for i in range(2):
        one = {name: x[i] for name, x in arrays.items()}
        want = reference(**one, block_mask=problem.mask, causal=True, q_offset=offsets[i])[0]
        assert error(np.asarray(got[i]), np.asarray(want)) <= 2e-5


def lowered(fn, *operands):
    return jax.jit(fn).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("case", CASES[2:7], ids=lambda case: case.name)
def test_lowers_for_tpu_with_gradients(case, monkeypatch):
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    problem = problem_of(case)

    def loss(arrays, mask, traced):
        out, lse, mass = attention("tpu")(block_mask=mask, **arrays, **traced, **problem.static)
        return out.astype("float32").sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), mass

    text = lowered(jax.value_and_grad(loss, has_aux=True), *problem[:3])
    assert text.count("tpu_custom_call") == 4  # forward, mass, dQ, dK and dV


def test_lowers_under_shard_map_and_checkpoint(monkeypatch, devices):
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    problem = problem_of(dataclasses.replace(SMALL, batch=2))
    mesh, over = Mesh(np.array(devices[:2]), ("data",)), PartitionSpec("data")

    def loss(arrays, mask, offset):
        run = jax.checkpoint(partial(block_sparse_attention, causal=True, implementation="tpu"))
        out = run(**arrays, block_mask=mask, q_offset=offset)
        return jax.lax.psum(out.sum(), "data")

    sharded = jax.shard_map(
        jax.value_and_grad(loss), mesh=mesh, in_specs=(over, PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(), over),
    )  # fmt: skip
    text = lowered(sharded, problem.arrays, problem.mask, problem.traced["q_offset"])
    assert text.count("tpu_custom_call") == 4  # forward twice


def structs(t=4096, d=128, a=8, g=4, block=128, dtype="bfloat16", width=None):
    """(form, q, k, lists by query, by key)."""
    struct, n = jax.ShapeDtypeStruct, t // block
    ints = lambda *s: struct(s, jnp.int32)  # noqa: E731
    width = width or n
    rows = BlockLists(ints(1, a, n, width), ints(1, a, n, width), ints(1, a, n), ints(1, a, n))
    cols = BlockLists(ints(1, a, n, n), ints(1, a, n, n), ints(1, a, n), ints(1, a, n))
    form = Form((block, block), (t, t), (), True, 1.0)
    return form, struct((1, a, g, t, d), dtype), struct((1, a, t, d), dtype), rows, cols


@pytest.mark.parametrize("device", [V5E, V5P, Tpu()], ids=["v5e", "v5p", "default"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_fit(device, dtype):
    for t in (128, 4096, 2**17):
        for d, g, block in ((64, 1, 64), (128, 4, 128), (256, 16, 128), (128, 3, 256)):
            form, q, k, rows, cols = structs(t + 128, d, 2, g, block, dtype)
            item = jnp.dtype(dtype).itemsize
            for kernel in ("forward", "mass", "dq"):
                plan = tiles.plan_rows(form, q, k, rows, device, kernel)
                assert g % plan.heads == 0 and plan.heads * block % 64 == 0
                size = tiles.row_bytes(plan, d, k.shape[2], item, kernel)
                assert size <= tiles.tile_room(device)
                assert plan.members * plan.listed % min(128, 64 * plan.members) == 0
            plan = tiles.plan_cols(form, q, k, cols, device)
            assert tiles.col_bytes(plan, d, item, 4) <= tiles.tile_room(device)


def test_keys_are_resident_where_that_moves_less():
    plan = tiles.plan_rows(*structs(2**15)[:4], V5P, "forward")
    assert plan.resident and plan.heads == 2  # 256 rows do
    assert not tiles.plan_rows(*structs(2**17)[:4], V5E, "forward").resident  # too long
    few = tiles.plan_rows(*structs(2**15, width=1, g=1)[:4], V5E, "forward")
    assert not few.resident and few.members == 1


def test_sizes_of_a_last_tile():
    plan = tiles.plan_rows(*structs(2**15)[:4], V5E, "forward")
    assert plan.members == 16 and plan.sizes == (2, 4, 6, 8, 12, 16)
    assert [int(plan.size_of(n)) for n in (1, 2, 3, 8, 9, 13, 16)] == [2, 2, 4, 8, 12, 16, 16]


def test_what_the_kernels_cannot_take(monkeypatch):
    none = Extras(jnp.zeros(1, jnp.int32))
    assert not tiles.supports(*structs(), none)
    assert "blocks of 64 or a multiple of 128; got 32 x 32" in tiles.supports(
        *structs(block=32), none
    )
    assert "float32 and bfloat16; got float16" in tiles.supports(*structs(dtype="float16"), none)
    huge = structs(2**13, block=4096)
    assert "bytes of VMEM for blocks of 4096 x 4096" in tiles.supports(*huge, none)
    bias = none._replace(bias=jax.ShapeDtypeStruct((), jnp.float32))
    assert not tiles.supports(*structs(2**21, g=2), bias)
    message = "lists of 32768 blocks and their bias in scalar memory"
    assert message in tiles.supports(*structs(2**22, g=2), bias)
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    q = jnp.ones((1, 32, 1, 8))
    mask = BlockMask.from_rule(Window(None, 0), (32, 32), (16, 16))
    with pytest.raises(NotImplementedError, match=r"got 16 x 16. Take implementation='xla'"):
        block_sparse_attention(q, q, q, mask, implementation="tpu")
    with pytest.warns(UserWarning, match="'xla' is taken here, for the TPU kernels need blocks"):
        block_sparse_attention(q, q, q, mask)
