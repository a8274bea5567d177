"""Exact selection against a stable argsort, for every dtype that scores may have."""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxsparse as jsp
from jaxsparse import patterns, select

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int16", "bool"]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 1.5e-45, 1e-7, 3.4e38, -3.4e38]
ALL = (jsp.Unstructured(), jsp.NM(2, 4), jsp.Block((2, 4)), jsp.Channel(-1), jsp.FanIn())
# One shape for each way of choosing, so that few programs are compiled: groups along one axis that
# are ranked in pairs, longer ones, and whole matrices; two groups each.
FORMS = {"pairs": ((2, 9), (-1,)), "long": ((2, 41), (-1,)), "matrix": ((2, 6, 8), (-2, -1))}


def as_float64(scores):
    """Exact for all dtypes up to 32 bits, subnormals included."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.asarray(scores).astype(np.float64)


def argsort_oracle(scores, count, axes):
    """The `count` largest of each group by a stable argsort; NaN last and never kept."""
    scores = np.asarray(scores)
    keys = as_float64(scores)
    lead = scores.shape[: scores.ndim - len(axes)]
    flat = keys.reshape(*lead, -1)
    order = np.lexsort((-flat, np.isnan(flat)), axis=-1)
    keep = np.zeros(flat.shape, bool)
    np.put_along_axis(keep, order[..., :count], True, -1)
    return (keep & ~np.isnan(flat)).reshape(scores.shape)


@functools.cache
def compiled(axes):
    return jax.jit(lambda scores, count: select.keep_top(scores, count, axes))


def elements(dtype):
    kind = ml_dtypes.finfo(dtype) if np.dtype(dtype).kind in "fV" else None
    if kind is None:
        info = None if dtype == "bool" else np.iinfo(dtype)
        return st.booleans() if info is None else st.integers(int(info.min), int(info.max))
    bits = st.integers(0, 2**kind.bits - 1).map(
        lambda i: np.array(i, f"uint{kind.bits}").view(dtype)
    )
    with np.errstate(all="ignore"):
        special = [np.array(x, np.float32).astype(dtype) for x in SPECIAL]
    return st.one_of(bits, st.sampled_from(special))


@st.composite
def scores_of(draw, dtype, shape):
    few = draw(st.lists(elements(dtype), min_size=1, max_size=6))  # so that there are ties
    every = draw(st.lists(elements(dtype), min_size=4, max_size=4))
    size = int(np.prod(shape))
    picks = draw(
        hnp.arrays(np.int64, size, elements=st.integers(0, len(few) + 3), fill=st.nothing())
    )
    return np.array([(few + every)[i] for i in picks], dtype).reshape(shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(data=st.data())
def test_keep_top_is_the_stable_argsort(dtype, form, data):
    shape, axes = FORMS[form]
    dtype = jnp.dtype(dtype)
    scores = data.draw(scores_of(dtype, shape))
    count = data.draw(st.integers(0, int(np.prod(shape[1:]))))
    with jax.numpy_dtype_promotion("strict"):
        got = np.asarray(compiled(axes)(scores, jnp.int32(count)))
    np.testing.assert_array_equal(got, argsort_oracle(scores, count, axes))
    valid = (~np.isnan(as_float64(scores))).reshape(2, -1).sum(1)
    np.testing.assert_array_equal(got.reshape(2, -1).sum(1), np.minimum(count, valid))


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(data=st.data())
def test_more_density_keeps_what_was_kept(form, data):
    shape, axes = FORMS[form]
    scores = data.draw(scores_of(jnp.dtype("float32"), shape))
    size = int(np.prod(shape[1:]))
    low = data.draw(st.integers(0, size))
    high = data.draw(st.integers(low, size))
    few, many = (compiled(axes)(scores, jnp.int32(c)) for c in (low, high))
    assert not (few & ~many).any()


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(data=st.data())
def test_without_ties_a_permutation_of_scores_permutes_the_mask(form, data):
    shape, axes = FORMS[form]
    size = int(np.prod(shape[1:]))
    rows = [np.array(data.draw(st.permutations(range(size)))) for _ in range(2)]
    order = np.array(data.draw(st.permutations(range(size))))
    scores = np.stack(rows).astype(np.float32) - size / 2
    count = jnp.int32(data.draw(st.integers(0, size)))
    mask = compiled(axes)(scores.reshape(shape), count)
    permuted = compiled(axes)(scores[:, order].reshape(shape), count)
    np.testing.assert_array_equal(
        np.asarray(mask).reshape(2, -1)[:, order], np.asarray(permuted).reshape(2, -1)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_count_for_each_group(form):
    shape, axes = FORMS[form]
    scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    count = jnp.array([1, 7], jnp.int32).reshape(2, *[1] * len(axes))
    got = compiled(axes)(scores, count)
    for i, c in enumerate((1, 7)):
        np.testing.assert_array_equal(got[i], argsort_oracle(scores[i][None], c, axes)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_large_group_with_few_distinct_scores(dtype):
    """Ties across many rows, at every kind of place for the last one."""
    scores = np.random.default_rng(1).integers(0, 3, (257, 129)).astype(dtype)
    for count in (0, 1, 128, 129, 130, 11111, 257 * 129 - 1, 257 * 129):
        got = compiled((-2, -1))(scores, jnp.int32(count))
        np.testing.assert_array_equal(got, argsort_oracle(scores[None], count, (-2, -1))[0])


def test_float64_and_int64_where_jax_has_them():
    base = np.array([1.0, 1.0 + 2**-52, -1e-320, 1e-320, 0.0, -0.0, np.nan, -np.inf] * 6)
    with jax.enable_x64(True):
        for scores in (base, (base[:6] * 0 + [2**62, 2**62 + 2**9, -1, 5, 0, 0]).astype(np.int64)):
            for count in (0, 1, 3, len(scores) - 1, len(scores)):
                got = select.keep_top(jnp.asarray(scores)[None], count, (-1,))
                keys = scores.astype(object)
                order = sorted(
                    (i for i in range(len(scores)) if scores[i] == scores[i]),
                    key=lambda i: (-keys[i], i),
                )
                assert np.flatnonzero(got[0]).tolist() == sorted(order[:count])


def test_a_traced_density_gives_the_static_mask_and_never_recompiles():
    scores = np.random.default_rng(2).normal(size=(3, 16, 8)).astype(np.float32)
    for pattern in ALL:
        chex.clear_trace_counter()
        make = jax.jit(chex.assert_max_traces(lambda s, d, p=pattern: jsp.make_mask(p, s, d), 1))
        for density in (0.0, 0.1, 0.25, 0.5, 1 / 3, 0.9, 1.0):
            np.testing.assert_array_equal(
                make(scores, jnp.float32(density)), jsp.make_mask(pattern, scores, density)
            )


def test_a_new_static_density_never_recompiles():
    scores = jnp.arange(48.0).reshape(6, 8)
    jsp.make_mask(jsp.Unstructured(), scores, 0.5)
    compiled_before = patterns.mask_of_count._cache_size()
    for density in (0.1, 0.2, 0.75):
        jsp.make_mask(jsp.Unstructured(), scores, density)
    assert patterns.mask_of_count._cache_size() == compiled_before


def test_no_sort_in_the_program():
    for pattern in ALL:
        make = jax.jit(jsp.make_mask, static_argnums=0)
        text = make.lower(pattern, jnp.zeros((2, 64, 32)), jnp.float32(0.5)).as_text()
        assert "sort" not in text and "top_k" not in text


def test_empty_scores():
    assert jsp.make_mask(jsp.Unstructured(), jnp.zeros((0, 4)), 0.5).shape == (0, 4)
    assert jsp.make_mask(jsp.NM(2, 4), jnp.zeros((4, 0)), 0.5).shape == (4, 0)
    assert jsp.make_mask(jsp.FanIn(), jnp.zeros((2, 0, 3)), 0.5).shape == (2, 0, 3)


@pytest.mark.parametrize(("dtype", "least"), [("int32", -(2**31)), ("uint32", 0)])
@pytest.mark.parametrize("size", [9, 41])
def test_the_two_lowest_integers_do_not_tie(dtype, least, size):
    scores = np.full(size, least, dtype)
    scores[-1] += 1
    mask = select.keep_top(jnp.asarray(scores), 1, (-1,))
    assert mask.tolist() == [False] * (size - 1) + [True]
