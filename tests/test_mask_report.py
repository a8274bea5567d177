"""`report`: counts by hand, verdicts by the table of break-even densities."""

import jax
import jax.numpy as jnp
import pytest

import jaxsparse as jsp
from jaxsparse import _report


@pytest.fixture
def pruned():
    params = {
        "embed": {"embedding": jnp.ones((10, 4))},
        "up": {"kernel": jax.random.normal(jax.random.key(0), (8, 16)), "bias": jnp.ones(16)},
        "stack": jax.random.normal(jax.random.key(1), (2, 8, 8), jnp.bfloat16),
    }
    plan = jsp.uniform(0.75, overrides={"stack": jsp.LeafPlan(jsp.Block((4, 4)), 0.5)})
    return *jsp.prune(params, plan), plan


def test_counts_flops_and_bytes_by_hand(pruned):
    params, masks, plan = pruned
    leaves = {leaf.path: leaf for leaf in jsp.report(params, masks, plan).leaves}
    assert set(leaves) == {"embed/embedding", "stack", "up/bias", "up/kernel"}
    up, stack = leaves["up/kernel"], leaves["stack"]
    assert (up.kept, up.size, up.flops_dense, up.flops_sparse) == (32, 128, 256, 64)
    assert (up.bytes_dense, up.bytes_sparse) == (512, 32 * 4 + 16)
    assert (stack.kept, stack.size, stack.bytes_dense, stack.bytes_sparse) == (64, 128, 256, 144)
    assert (up.pattern, stack.pattern) == ("Unstructured", "Block")
    embedding = leaves["embed/embedding"]
    assert (embedding.flops_dense, embedding.speed, embedding.pattern) == (0, "dense", "")
    total = jsp.report(params, masks, plan).total
    assert (total.kept, total.size) == (40 + 16 + 32 + 64, 40 + 16 + 128 + 128)
    assert total.flops_sparse == 64 + 128


def test_speed_follows_the_measured_table(pruned, monkeypatch):
    params, masks, plan = pruned
    table = {"slab": {"Unstructured": {"density": 0.3}, "Block": {"density": 0.4}}}
    monkeypatch.setattr(_report, "break_even", lambda: table)
    found = {
        leaf.path: leaf.speed for leaf in jsp.report(params, masks, plan, device="slab").leaves
    }
    assert found["up/kernel"] == "faster"  # density 0.25 is below 0.3
    assert found["stack"] == "only zeros"  # density 0.5 is above 0.4
    elsewhere = jsp.report(params, masks, plan, device="other")
    assert {leaf.speed for leaf in elsewhere.leaves} == {"unmeasured", "dense"}
    assert "bench_break_even" in str(elsewhere)


def test_the_table_of_the_wheel_names_every_pattern_on_a_cpu():
    measured = _report.break_even()["cpu"]
    for pattern in ("Unstructured", "NM", "Block", "Channel", "FanIn"):
        assert 0 <= measured[pattern]["density"] <= 1
        assert measured[pattern]["ratio_to_dense"]


def test_text_and_html_show_every_leaf_and_escape(pruned):
    params, masks, plan = pruned
    params, masks = {"<w>": params}, {"<w>": masks}
    found = jsp.report(params, masks)
    text, page = str(found), found._repr_html_()
    assert repr(found) == text
    for leaf in found.leaves:
        assert leaf.path in text
    assert text.count("25.0%") == 0 and text.count("75.0%") == 1
    assert "&lt;w&gt;/stack" in page and "<w>" not in page
    assert page.count("<tr>") == 1 + len(found.leaves) + 1


def test_masks_that_do_not_fit_are_named(pruned):
    params, masks, _ = pruned
    with pytest.raises(ValueError, match="up/kernel.*does not broadcast"):
        jsp.report(params, {**masks, "up": {**masks["up"], "kernel": jnp.ones((3, 3), bool)}})
