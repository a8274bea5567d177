"""The Hopper kernels of block-sparse attention: interpreted, which finds races, and lowered."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockMask, Prefix, Where, Window, _op, block_sparse_attention
from pallas_kernels import _attention_walk_gpu as tiles
from pallas_kernels import _block_sparse_attention as op
from pallas_kernels import _block_sparse_attention_backward_gpu as backward
from pallas_kernels import _block_sparse_attention_gpu as kernels
from pallas_kernels._attention_cases import Case, reference
from pallas_kernels._block_sparse_attention_xla import mass
from pallas_kernels._compat import gpu_races_found, rule_runs_in_gpu_kernel
from tests.pallas_kernels.attention import assert_like_reference, attention, error, problem_of
from tests.pallas_kernels.gpu import interpret, lower, needs_interpreter

OUT_AND_LSE = (1.0, 1.0, 0.0)
TOLERANCE = {"float16": 4e-3, "bfloat16": 2e-2}


def small(case):
    """A case of two blocks, and a ragged end if it has one, in 16 bits."""
    dtype = "bfloat16" if case.dtype == "bfloat16" else "float16"
    sizes = zip(case.shape, case.block, strict=True)
    shape = tuple(min(n, 2 * block + (block // 4 if n % block else 0)) for n, block in sizes)
    return dataclasses.replace(case, shape=shape, dtype=dtype, tolerance=TOLERANCE[dtype])


CASES = [small(case) for case in op.CASES if case.name != "full"]
ALL = ("causal", "window", "segments", "softcap", "bias")
LAYOUTS = (  # how warpgroups share blocks, at every head width
    Case("two heads, 64", (128, 128), (2, 1), 1, 64, (64, 128), 0.8, ALL),
    Case("two lists, 128", (192, 192), (2, 2), 2, 128, (64, 64), 0.7, ("causal", "segments")),
    Case("two heads, 256", (128, 128), (2, 1), 1, 256, (64, 64), 0.8, ALL),
    Case("halves of 128, 256", (128, 256), (1, 1), 1, 256, (128, 128), 1.0, ("causal", "offset")),
    Case("halves, two lists of keys", (128, 192), (1, 1), 1, 64, (128, 64), 0.8, ("window",)),
    Case("units that share a head", (128, 128), (4, 1), 2, 64, (64, 64), 1.0, ("causal",), 2),
)
SMALL = Case("small", (128, 192), (2, 1), 1, 64, (64, 64), 0.7, ("causal", "offset"))
SMALL = dataclasses.replace(SMALL, dtype="float16", tolerance=4e-3)


@pytest.fixture
def here(monkeypatch):
    """Let `implementation="gpu"` be chosen."""
    monkeypatch.setattr(_op, "here", lambda: "gpu")


@pytest.fixture
def interpreted(monkeypatch, here):
    """Let `implementation="gpu"` run here."""
    mode = interpret()
    implementation = op.Implementation(
        lambda *a: kernels.forward(*a, interpret=mode),
        lambda *a: kernels.backward(*a, interpret=mode),
        mass,
    )
    monkeypatch.setitem(op.IMPLEMENTATIONS, "gpu", implementation)


def check(case):
    attend = partial(attention("gpu"))  # a new one: lowering compiled another
    assert_like_reference(attend, problem_of(case), case.tolerance, OUT_AND_LSE)
    assert not gpu_races_found()


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case, interpreted):
    check(case)


@needs_interpreter
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_layouts(case, interpreted):
    check(dataclasses.replace(case, dtype="float16", tolerance=4e-3))


@needs_interpreter
def test_keys_that_no_block_lists_do_not_matter(interpreted):
    problem = problem_of(SMALL)
    listed = jnp.array([[True, False, True], [False, False, True]])
    mask = BlockMask.from_dense(listed, (64, 64))
    q, k, v = (problem.arrays[name] for name in "qkv")
    options = {"implementation": "gpu", "scale": -0.2}
    hidden = k.at[:, 64:128].set(jnp.nan), v.at[:, 64:128].set(jnp.nan)
    got = block_sparse_attention(q, *hidden, mask, **options)
    assert error(got, reference(q, k, v, mask, scale=-0.2)[0]) < SMALL.tolerance


@needs_interpreter
@pytest.mark.parametrize("over", ["q", "v"])
def test_under_vmap(over, interpreted):
    problem = problem_of(SMALL)
    axes = tuple(0 if name in over else None for name in "qkv")
    arrays = [problem.arrays[name] for name in "qkv"]
    stacked = [
        x if axis is None else jnp.stack([x, x[:, ::-1]])
        for x, axis in zip(arrays, axes, strict=True)
    ]

    def loss(attend, *arrays):
        out = attend(*arrays, problem.mask, causal=True, **problem.traced)
        out = out if isinstance(out, jax.Array) else out[0]
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    def gradients(attend):
        grad = jax.value_and_grad(partial(loss, attend), (0, 1, 2))
        return jax.jit(jax.vmap(grad, axes))(*stacked)

    got = gradients(partial(block_sparse_attention, implementation="gpu"))
    assert not gpu_races_found()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients(reference)), strict=True):
        assert error(a, b) < SMALL.tolerance


def structs(case):
    problem = problem_of(case)
    loss = lambda arrays, mask, traced: (  # noqa: E731
        block_sparse_attention(block_mask=mask, **arrays, **traced, **problem.static)
        .astype(jnp.float32)
        .sum()
    )
    return loss, problem[:3]


@pytest.mark.parametrize("case", [*CASES[::3], *LAYOUTS[::2]], ids=lambda case: case.name)
def test_lowers_for_cuda_with_gradients(case, here):
    dtype = "bfloat16" if case.dtype == "float32" else case.dtype
    loss, operands = structs(dataclasses.replace(case, dtype=dtype))
    text = lower(jax.value_and_grad(loss), *operands)
    assert text.count("@mosaic_gpu_v2(") + text.count("call @mosaic_gpu(") == 3


def test_lowers_inside_shard_map(here, devices):
    loss, (arrays, mask, traced) = structs(dataclasses.replace(SMALL, batch=8))
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    in_specs = (P("data"), P(), P())
    grad = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=in_specs, out_specs=P("data"))
    assert "mosaic_gpu" in lower(grad, arrays, mask, traced)


RULES = (
    Window(64, 3) | Prefix(5),
    ~(Window(None, 0) & ~Prefix(80)),
    Where(lambda q, k: (q - k) % 3 == 0),
    Where(lambda q, k: (q < 0) | ((q ^ k) >= 9) & (jnp.minimum(q, k) > 1)),
)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_rules_lower(rule, here):
    q = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    mask = BlockMask.from_rule(rule, (128, 128), (64, 64))
    assert "mosaic_gpu" in lower(block_sparse_attention, q, q, q, mask)


@needs_interpreter
def test_many_rules_of_one_mask(interpreted):
    q = jax.random.normal(jax.random.key(0), (1, 128, 2, 64)).astype(jnp.float16)
    kinds = jnp.array([[[[1, 4], [3, 2]]]])
    mask = BlockMask.from_kinds(kinds, (128, 128), (64, 64), rules=RULES)
    got = block_sparse_attention(q, q, q, mask, implementation="gpu")
    assert error(got, reference(q, q, q, mask)[0]) < SMALL.tolerance


@pytest.mark.parametrize(
    ("dtype", "d", "block", "rule", "reason"),
    [
        ("float32", 64, (64, 64), None, "bfloat16 and float16; got float32"),
        ("float16", 80, (64, 64), None, "64, 128 or 256 wide; got 80"),
        ("float16", 256, (64, 64), None, "an even number of query heads a list"),
        ("float16", 64, (32, 64), None, r"64 or 128 tokens; got \(32, 64\)"),
        (
            "float16",
            64,
            (64, 64),
            Where(lambda q, k: jax.lax.population_count(q + k) >= 0),
            "Mosaic GPU lacks",
        ),
    ],
)
def test_what_hopper_cannot_take(dtype, d, block, rule, reason, here):
    q = jnp.ones((1, 128, 1, d), dtype)
    mask = BlockMask.from_rule(rule or Prefix(70), (128, 128), block)
    with pytest.warns(UserWarning, match=reason):
        out = block_sparse_attention(q, q, q, mask)  # by the XLA form
    np.testing.assert_allclose(out, 1, rtol=1e-3)
    with pytest.raises(NotImplementedError, match=reason):
        block_sparse_attention(q, q, q, mask, implementation="gpu")


def test_rules_that_are_left_to_the_xla_form():
    assert all(map(rule_runs_in_gpu_kernel, RULES))
    assert not rule_runs_in_gpu_kernel(Where(lambda q, k: ~(q > k)))
    assert not rule_runs_in_gpu_kernel(Where(lambda q, k: (q & 4).astype(bool)))
    assert not rule_runs_in_gpu_kernel(Where(lambda q, k: q + jnp.arange(64) > k))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("bq", [64, 128])
@pytest.mark.parametrize("bkv", [64, 128])
@pytest.mark.parametrize("g", [1, 2, 3])
def test_tiles_fit(d, bq, bkv, g):
    if d == 256 and bq == 64 and g % 2:
        pytest.skip("left to the XLA form")
    sizes = {"forward": (1, 1, 0), "dq": (2, 2, 0), "dkv": (2, 0, 2)}
    configs = {
        "forward": kernels.choose_config((bq, bkv), g, d),
        "dq": backward.choose_config((bq, bkv), g, d),
        "dkv": backward.choose_key_config((bq, bkv), d),
    }
    for name, config in configs.items():
        used = tiles.shared_bytes(config, d, *sizes[name])
        assert used <= tiles.SHARED_MEMORY - tiles.BARRIERS
        more = dataclasses.replace(config, stages=config.stages + 1)
        full = tiles.shared_bytes(more, d, *sizes[name]) > tiles.SHARED_MEMORY - tiles.BARRIERS
        assert full or config.stages == tiles.MOST_STAGES
        own, other = (bkv, bq) if name == "dkv" else (bq, bkv)
        assert other % config.tile == 0
        shares = config.parts, config.heads, config.lines, 1 + config.roles
        assert sorted(shares) == [1, 1, 1, 2] and g % config.heads == 0
        assert config.parts * tiles.ROWS <= own
        # Float32 sums, scores and one more tile of a thread, of the 240 registers it has.
        sums = 2 if name == "dkv" and not config.roles else 1
        tiles_of_scores = 1.5 if name == "forward" else 2
        assert (sums * d + tiles_of_scores * config.tile) * tiles.ROWS / 128 <= 200


def test_tiles_of_common_shapes():
    fast = kernels.choose_config((128, 128), 4, 128)
    assert fast == tiles.Config(128, 3, parts=2)
    assert tiles.shared_bytes(fast, 128, 1, 1, 0) == (2 * 64 + 3 * 2 * 128) * 256 + 512
    assert kernels.choose_config((64, 64), 16, 128) == tiles.Config(64, 4, heads=2)
    assert backward.choose_key_config((128, 128), 256) == tiles.Config(64, 2, roles=True)
