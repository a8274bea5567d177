"""Plans: which leaves are pruned how far, against numpy and by hand."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxsparse as jsp
from tests.conformance.lists import SHAPES, TREES, make_params

F32 = jax.ShapeDtypeStruct((4, 4), jnp.float32)

# path of a 4 x 4 leaf, whether it is pruned by default
DEFAULTS = {
    "up/kernel": True,
    "layers/0/attention/q/kernel": True,
    "w": True,
    "normalize/kernel": True,
    "embed/embedding": False,
    "token_embedder/w": False,
    "wte": False,
    "layers/norm/scale": False,
    "layers/norm_1/scale": False,
    "LayerNorm_0/w": False,
    "final_norm/w": False,
    "layers/up/bias": False,
    "layers/scale": False,
}


@pytest.mark.parametrize("path", DEFAULTS)
def test_which_leaves_are_pruned_by_default(path):
    tree = F32
    for part in reversed(path.split("/")):
        tree = {part: tree}
    assert (jsp.uniform(0.5)(tree)[path].sparsity == 0.5) == DEFAULTS[path]


@pytest.mark.parametrize("shape", [(), (7,), (0,)])
def test_leaves_of_fewer_than_two_axes_stay_dense(shape):
    assert jsp.uniform(0.5)({"w": jnp.zeros(shape)})["w"].sparsity == 0


def test_integer_leaves_and_keys_stay_dense():
    tree = {"w": F32, "ids": jnp.zeros((4, 4), jnp.int32), "rng": jax.random.key(0), "n": 3}
    plan = jsp.uniform(0.5)(tree)
    assert [plan[path].sparsity for path in ("w", "ids", "rng", "n")] == [0.5, 0, 0, 0]


@pytest.mark.parametrize("tree", TREES)
def test_paths_read_the_same_in_every_tree(tree):
    plan = jsp.uniform(0.5)(make_params(tree))
    assert sorted(plan.shapes) == sorted(SHAPES.values())
    assert all("value" not in path and "." not in path for path in plan.paths)
    pruned = {shape for shape, leaf in zip(plan.shapes, plan.leaves, strict=True) if leaf.sparsity}
    assert pruned == {SHAPES["kernel"], SHAPES["stack"]}


def test_paths_of_nnx_have_no_value():
    assert set(jsp.uniform(0.5)(make_params("nnx")).paths) == {"head/kernel", "head/bias", "stack"}


# where, overrides, sparsity of a, b/kernel, b/bias (8 x 8 each)
RULES = {
    "a glob": ("*/kernel", {}, (0, 0.5, 0)),
    "a glob over the whole path": ("*", {}, (0.5, 0.5, 0.5)),
    "a predicate of the path": (lambda path, leaf: path == "a", {}, (0.5, 0, 0)),
    "a predicate of the leaf": (lambda path, leaf: leaf.ndim == 2, {}, (0.5, 0.5, 0.5)),
    "an override": (None, {"a": 0.25}, (0.25, 0.5, 0)),
    "dense by override": (None, {"b/*": 0.0}, (0.5, 0, 0)),
    "pruned by override": (None, {"*/bias": 0.75}, (0.5, 0.5, 0.75)),
    "the first override holds": (None, {"b/k*": 0.125, "b/*": 0.25}, (0.5, 0.125, 0.25)),
    "a predicate in overrides": (None, {(lambda p, x: p == "a"): 0.0}, (0, 0.5, 0)),
    "a leaf plan": (None, {"a": jsp.LeafPlan(jsp.NM(1, 4), 0.1)}, (0.75, 0.5, 0)),
    "override beats where": ("*/kernel", {"a": 0.25}, (0.25, 0.5, 0)),
}


@pytest.mark.parametrize("make", [jsp.uniform, jsp.erk, jsp.global_, jsp.lamp])
@pytest.mark.parametrize(("where", "overrides", "sparsities"), RULES.values(), ids=RULES)
def test_rules(make, where, overrides, sparsities):
    leaf = jnp.ones((8, 8))
    params = {"a": leaf, "b": {"kernel": leaf, "bias": leaf}}
    plan = make(0.5, where=where, overrides=overrides)(params)
    # Equal shapes: erk gives each the same, and overridden leaves stand apart.
    np.testing.assert_allclose(
        [plan[p].sparsity for p in ("a", "b/kernel", "b/bias")], sparsities, atol=1e-12
    )


@pytest.mark.parametrize("make", [jsp.uniform, jsp.erk, jsp.global_, jsp.lamp])
def test_an_nm_leaf_has_one_sparsity_whatever_is_asked(make):
    plan = make(0.9, jsp.NM(2, 4))({"w": jnp.ones((8, 8))})
    assert plan["w"].sparsity == 0.5 and not any(plan.pooled)


def numpy_erk(shapes, sparsity):
    """Erdos-Renyi-kernel densities: scale all, cap the largest one at 1, and again."""
    sizes = np.array([np.prod(s) for s in shapes], float)
    raw = np.array([sum(s[-2:]) / np.prod(s[-2:]) for s in shapes])
    dense = np.zeros(len(shapes), bool)
    while True:
        budget = (1 - sparsity) * sizes.sum() - sizes[dense].sum()
        scale = budget / (raw * sizes)[~dense].sum() if not dense.all() else 0
        density = np.where(dense, 1.0, scale * raw)
        if density.max() <= 1:
            return density
        dense |= density == density.max()


MATRIX = st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple)


@hypothesis.given(st.lists(MATRIX, min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_erk_is_that_of_numpy(shapes, sparsity):
    params = {f"w{i}": jax.ShapeDtypeStruct(s, jnp.float32) for i, s in enumerate(shapes)}
    plan = jsp.erk(sparsity)(params)
    density = np.array([leaf.density for leaf in plan.leaves])
    np.testing.assert_allclose(density, numpy_erk(shapes, sparsity), rtol=1e-6, atol=1e-9)
    sizes = np.array([np.prod(s) for s in shapes])
    assert density.max() <= 1 + 1e-12
    np.testing.assert_allclose((density * sizes).sum(), (1 - sparsity) * sizes.sum(), rtol=1e-9)
    # What is kept misses the target by rounding alone: half a weight for each slice.
    kept = sum(plan.kept(i) for i in range(len(shapes)))
    slices = sum(np.prod(s[:-2]) for s in shapes)
    assert abs(kept - (1 - sparsity) * sizes.sum()) <= slices / 2 + 1e-6


def test_erk_caps_small_leaves_and_treats_layers_as_copies():
    stacked = {"tiny": jnp.ones((2, 2)), "layers": jnp.ones((3, 32, 32))}
    apart = {"tiny": jnp.ones((2, 2)), **{f"l{i}": jnp.ones((32, 32)) for i in range(3)}}
    plan, same = jsp.erk(0.9)(stacked), jsp.erk(0.9)(apart)
    assert plan["tiny"].sparsity == 0 and plan["layers"].sparsity == same["l0"].sparsity
    np.testing.assert_allclose(plan["layers"].density, (0.1 * 3076 - 4) / 3072, rtol=1e-12)


def test_erk_sets_overridden_and_nm_leaves_apart():
    params = {k: jnp.ones((16, 16)) for k in "abcd"}
    overrides = {"a": 0.0, "b": jsp.LeafPlan(jsp.NM(2, 4), 0.5)}
    plan = jsp.erk(0.9, overrides=overrides)(params)
    assert [round(leaf.sparsity, 12) for leaf in plan.leaves] == [0, 0.5, 0.9, 0.9]
    assert plan.pooled == (False, False, True, True)


def test_plans_need_only_shapes():
    params = make_params()
    abstract = jax.eval_shape(lambda: params)
    for make in (jsp.uniform, jsp.erk, jsp.global_, jsp.lamp):
        assert make(0.75)(abstract) == make(0.75)(params)
        hash(make(0.75)(abstract))


def test_a_plan_prints_what_it_keeps():
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones(3), "c": jnp.ones((2, 8, 8))}
    overrides = {"c": jsp.LeafPlan(jsp.NM(2, 4), 0.5)}
    lines = str(jsp.uniform(0.9, jsp.Block((2, 2)), overrides=overrides)(params)).splitlines()
    assert [line.split() for line in lines] == [
        ["leaf", "shape", "pattern", "sparsity", "kept"],
        ["-" * 5, "-" * 11, "-" * 21, "-" * 8, "-" * 6],
        ["a", "(4", "x", "8)", "Block((2,", "2))", "0.9", "4/32"],
        ["b", "(3)", "dense", "0", "3/3"],
        ["c", "(2", "x", "8", "x", "8)", "NM(n=2,", "m=4,", "axis=-2)", "0.5", "64/128"],
        ["total", f"{1 - 71 / 163:.6g}", "71/163"],
    ]
    assert str(jsp.uniform(0.5)({})).splitlines()[-1].split() == ["total", "0", "0/0"]


def test_any_function_from_params_to_a_plan_is_a_distribution():
    def only_first(params):
        plan = jsp.uniform(0.5)(params)
        leaves = (plan.leaves[0], *(jsp.LeafPlan(jsp.Unstructured(), 0.0) for _ in plan.leaves[1:]))
        return jsp.Plan(plan.paths, plan.shapes, leaves, plan.pooled)

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    masks = jsp.prune(params, only_first)[1]
    assert int(masks["a"].sum()) == 8 and masks["b"].shape == ()
