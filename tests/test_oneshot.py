"""`prune`: magnitudes, allocators, every tree, and a second time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp
from tests.conformance.lists import PATTERNS, TREES, make_params


@pytest.mark.parametrize("tree", TREES)
def test_trees(tree):
    params = make_params(tree)
    pruned, masks = jax.jit(lambda p: jsp.prune(p, jsp.uniform(0.75)))(params)
    assert jax.tree.structure(pruned) == jax.tree.structure(params) == jax.tree.structure(masks)
    for w, p, m in zip(*map(jax.tree.leaves, (params, pruned, masks)), strict=True):
        if w.ndim == 1:
            assert m.shape == () and m
            np.testing.assert_array_equal(p, w)
            continue
        assert m.shape == w.shape and int(m.sum()) == w.size // 4
        np.testing.assert_array_equal(p, np.where(m, w, 0))
        slices = (np.asarray(x).reshape(-1, *w.shape[-2:]) for x in (m, abs(w)))
        for kept, size in zip(*slices, strict=True):
            assert size[kept].min() >= size[~kept].max()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pruning_a_pruned_tree_changes_nothing(pattern):
    plan = jsp.uniform(0.5, PATTERNS[pattern])
    pruned, masks = jsp.prune(make_params(), plan)
    again, same = jsp.prune(pruned, plan)
    jax.tree.map(np.testing.assert_array_equal, (pruned, masks), (again, same))


def test_overrides_set_patterns_and_sparsities_of_their_own():
    params = make_params()
    overrides = {
        "*/stack": jsp.LeafPlan(jsp.NM(1, 4), 0.9),
        "*/bias": jsp.LeafPlan(jsp.Unstructured(ndim=1), 0.25),
    }
    _, masks = jsp.prune(params, jsp.uniform(0.5, overrides=overrides))
    leaves = masks["layers"]["up"]
    assert int(leaves["kernel"].sum()) == 64 and int(leaves["bias"].sum()) == 12
    assert (np.asarray(leaves["stack"]).reshape(2, 2, 4, 8).sum(2) == 1).all()


def test_a_score_of_ones_own():
    params = {"w": jnp.arange(8.0).reshape(2, 4)}
    _, masks = jsp.prune(params, jsp.uniform(0.5), lambda w, *, age: -age, age={"w": params["w"]})
    np.testing.assert_array_equal(masks["w"], [[1, 1, 1, 1], [0, 0, 0, 0]])


def test_integer_leaves_and_embeddings_pass_through():
    params = {
        "embed": {"embedding": jnp.ones((4, 4))},
        "table": jnp.ones((4, 4), jnp.int32),
        "key": jax.random.key(0),
        "w": jnp.ones((4, 4)),
    }
    pruned, masks = jsp.prune(params, jsp.uniform(0.5))
    assert {k: jnp.ndim(m) for k, m in masks.items() if k != "embed"} == {
        "table": 0,
        "key": 0,
        "w": 2,
    }
    assert pruned["table"].dtype == jnp.int32 and (pruned["table"] == 1).all()
    assert jnp.ndim(masks["embed"]["embedding"]) == 0
