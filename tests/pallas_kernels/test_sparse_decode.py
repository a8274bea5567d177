"""Decode attention over selected pages against numpy: all cases, and what callers rely on."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import Mesh, PartitionSpec

from experiments.check_kernels import error
from pallas_kernels import _op
from pallas_kernels import _sparse_decode_xla as xla
from pallas_kernels._sparse_decode import (
    CASES,
    IMPLEMENTATIONS,
    OP,
    check_pages,
    sparse_decode_attention,
)
from tests.pallas_kernels.decode import assert_right, operands, oracle

RUNS_HERE = [name for name in IMPLEMENTATIONS if name in ("xla", _op.here())]
SMALL = CASES[0]
attend = jax.jit(partial(sparse_decode_attention, return_lse=True))


@pytest.mark.parametrize("implementation", RUNS_HERE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case, implementation):
    run = partial(
        sparse_decode_attention,
        logit_softcap=case.softcap,
        return_lse=True,
        implementation=implementation,
    )
    args = operands(case)
    want = oracle(*args, softcap=case.softcap)
    assert_right(jax.jit(run)(*args), want, case)
    reference = jax.jit(partial(OP.reference, logit_softcap=case.softcap))
    assert error(reference(*args)[0], want[0]) < 1e-5


def test_lists_of_any_length_in_parts_of_any_size(monkeypatch):
    case = dataclasses.replace(SMALL, batch=3, tokens=2, page=16, length=400, entries=25)
    args = operands(case, seed=1)
    want = oracle(*args)
    for part, at_once in ((16, 16), (48, 100), (4096, 2**16)):
        monkeypatch.setattr(xla, "PART", part)
        monkeypatch.setattr(xla, "AT_ONCE", {"cpu": at_once})
        xla.attend.clear_cache()
        assert_right(sparse_decode_attention(*args, return_lse=True), want, case)
    monkeypatch.undo()
    xla.attend.clear_cache()


def test_new_lists_counts_positions_and_tables_never_recompile():
    before = attend._cache_size()
    for seed in range(4):
        args = operands(SMALL, seed)
        assert_right(attend(*args), oracle(*args), SMALL)
    assert attend._cache_size() - before <= 1


def test_memory_beside_the_operands_is_that_of_a_turn():
    """Neither a larger cache nor longer lists take more, but for the lists and two sums a part."""

    def used(times, longer):
        q, cache, ids, count, table, positions = operands(SMALL)
        cache, ids = jnp.concatenate([cache] * times), jnp.concatenate([ids] * longer, -1)
        run = jax.jit(sparse_decode_attention)
        compiled = run.lower(q, cache, ids, count, table, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes, ids, cache

    one, ids, cache = used(1, 1)
    assert used(8, 1)[0] == one
    longer, ids, _ = used(1, 64)
    page = cache[0, 0].nbytes
    assert longer - one < ids.size * page / 16


def test_all_pages_of_all_tokens_are_causal_attention():
    case = dataclasses.replace(SMALL, tokens=5, length=200, entries=4)
    q, cache, _, _, table, positions = operands(case)
    b, _, h, d = q.shape
    ids = jnp.broadcast_to(jnp.arange(4), (b, case.heads[1], 4))
    got = sparse_decode_attention(q, cache, ids, jnp.full(ids.shape[:2], 4), table, positions)
    k, v = (cache[table, :, i].swapaxes(2, 3).reshape(b, -1, case.heads[1], d) for i in (0, 1))
    k, v = jnp.nan_to_num(k), jnp.nan_to_num(v)
    seen = jnp.arange(k.shape[1]) <= positions[:, None, :, None]
    want = jax.nn.dot_product_attention(q, k, v, mask=seen)
    assert error(got, want) < 1e-5


def test_parts_of_a_list_merge_to_the_whole():
    q, cache, ids, count, table, positions = operands(SMALL)
    half = ids.shape[-1] // 2
    lists = (ids[..., :half], jnp.minimum(count, half)), (ids[..., half:], count - half)
    parts = [attend(q, cache, i, jnp.maximum(c, 0), table, positions) for i, c in lists]
    outs, lses = (jnp.stack(a) for a in zip(*parts, strict=True))
    lse = jax.nn.logsumexp(lses, 0)
    share = jnp.exp(lses - jnp.where(jnp.isneginf(lse), 0, lse))
    out = (share[..., None] * outs).sum(0)
    assert_right((out, lse), oracle(q, cache, ids, count, table, positions), SMALL)


def test_a_page_that_is_not_there_is_skipped():
    q, cache, ids, count, table, positions = operands(SMALL)
    want = attend(q, cache, ids, count, table, positions)
    places = table.shape[1]
    for junk in (-1, places, 2**20):
        more = jnp.concatenate([jnp.full_like(ids[..., :1], junk), ids], -1)
        got = attend(q, cache, more, count + 1, table, positions)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    for junk in (-1, cache.shape[0]):
        empty = attend(q, cache, ids, count, jnp.full_like(table, junk), positions)
        assert not empty[0].any() and np.isneginf(empty[1]).all()


def test_a_token_that_is_not_there_sees_nothing():
    q, cache, ids, count, table, positions = operands(CASES[1])
    out, lse = attend(q, cache, ids, count, table, positions.at[:, 0].set(-1))
    assert not out[:, 0].any() and np.isneginf(lse[:, 0]).all()
    whole = attend(q, cache, ids, count, table, positions)
    np.testing.assert_allclose(out[:, 1:], whole[0][:, 1:], atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_under_vmap(shared):
    parts = [list(operands(SMALL, seed)) for seed in (0, 1)]
    if shared:  # one cache and table for both
        parts[1] = [parts[1][0], *parts[0][1:4], parts[0][4], parts[0][5]]
    axes = (0, None, 0, 0, None, 0) if shared else 0
    stacked = [
        parts[0][i] if shared and i in (1, 4) else jnp.stack([p[i] for p in parts])
        for i in range(6)
    ]
    got = jax.jit(jax.vmap(partial(sparse_decode_attention, return_lse=True), axes))(*stacked)
    for i, args in enumerate(parts):
        assert_right([a[i] for a in got], oracle(*args), SMALL)


def test_under_shard_map_over_key_heads(devices):
    args = operands(SMALL)
    mesh, spec = Mesh(np.array(devices[:2]), "h"), PartitionSpec
    heads = spec(None, "h")
    specs = spec(None, None, "h"), heads, heads, heads, spec(), spec()
    run = partial(sparse_decode_attention, return_lse=True)
    out_specs = spec(None, None, "h"), spec(None, None, "h")
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs))
    assert_right(run(*args), oracle(*args), SMALL)


def test_scale_dtypes_and_empty_operands():
    q, cache, ids, count, table, positions = operands(SMALL)
    got = sparse_decode_attention(q, cache, ids, count, table, positions, scale=0.3)
    assert error(got, oracle(q, cache, ids, count, table, positions, scale=0.3)[0]) < 1e-5
    out, lse = sparse_decode_attention(
        q, cache, ids[..., :0], 0 * count, table, positions, return_lse=True
    )
    assert not out.any() and np.isneginf(lse).all() and out.shape == q.shape
    small = [a.astype(jnp.bfloat16) for a in (q, cache)]
    with jax.numpy_dtype_promotion("strict"):
        out, lse = sparse_decode_attention(*small, ids, count, table, positions, return_lse=True)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


def test_it_has_no_derivative_and_says_so():
    q, *rest = operands(SMALL)
    loss = lambda q: sparse_decode_attention(q, *rest).sum()  # noqa: E731
    for take in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(NotImplementedError, match="no derivative, for it is for decoding"):
            take(q)
    stopped = jax.grad(lambda q: loss(jax.lax.stop_gradient(q)) + q.sum())(q)
    assert (stopped == 1).all()


def test_errors():
    q, cache, ids, count, table, positions = operands(SMALL)
    for wrong in (cache[:, :, 0], cache[:, :, :1], cache[..., :-1], cache[:, :, [0, 1, 1]]):
        with pytest.raises(ValueError, match=r"q must be \[B, T, H, D\], and kv_pages \[pages"):
            sparse_decode_attention(q, wrong, ids, count, table, positions)
    with pytest.raises(ValueError, match="the heads of q, 3, must be a multiple of the 2 of"):
        sparse_decode_attention(q[:, :, :3], cache, ids, count, table, positions)
    with pytest.raises(ValueError, match=r"page_ids must be \[2, 2, P\] .* got \(2, 1, 8\)"):
        sparse_decode_attention(q, cache, ids[:, :1], count, table, positions)
    with pytest.raises(ValueError, match=r"positions must be \[2, 1\]"):
        sparse_decode_attention(q, cache, ids, count, table, positions[:1])
    with pytest.raises(ValueError, match="block_table has no page"):
        sparse_decode_attention(q, cache, ids, count, table[:, :0], positions)
    with pytest.raises(TypeError, match="page_count must be integers; got float32"):
        sparse_decode_attention(q, cache, ids, count * 1.0, table, positions)
    with pytest.raises(TypeError, match="one float dtype; got bfloat16 and float32. Convert q"):
        sparse_decode_attention(q.astype(jnp.bfloat16), cache, ids, count, table, positions)
    with pytest.raises(ValueError, match="has the implementations"):
        sparse_decode_attention(q, cache, ids, count, table, positions, implementation="cuda")


def test_lists_that_are_wrong_are_refused():
    q, cache, ids, count, table, positions = operands(SMALL)
    pages = cache.shape[0]
    check_pages(ids, count, table, pages)
    last = (-1, -1, 0)  # of the list that is full
    second = int(ids[-1, -1, 1])
    wrong = {
        "a list may name a page once; got": (ids.at[last].set(second), count, table),
        f"an id must be 0 to {table.shape[1] - 1}.*got 99": (ids.at[last].set(99), count, table),
        f"a place of 0 to {pages - 1}; got": (ids, count, table.at[-1].set(-1)),
        "page_count must be 0 to 8.*got 9": (ids, count.at[0, 0].set(9), table),
    }
    run = jax.jit(checkify.checkify(sparse_decode_attention, errors=checkify.user_checks))
    run(q, cache, ids, count, table, positions)[0].throw()
    for message, lists in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_pages(*lists, pages)
        found = run(q, cache, *lists, positions)[0].get()
        assert found and message.split(";")[0].split(".*")[0] in found
    jax.jit(partial(check_pages, pages=pages))(ids.at[last].set(99), count, table)  # does nothing
