"""`report`: counts by hand, verdicts by the table of break-even densities, which layers obey."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as jsp
from jaxsparse.formats import _break_even


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
    monkeypatch.setattr(_break_even, "break_even", lambda: table)
    found = {
        leaf.path: leaf.speed for leaf in jsp.report(params, masks, plan, device="slab").leaves
    }
    assert found["up/kernel"] == "faster"  # density 0.25 is below 0.3
    assert found["stack"] == "only zeros"  # density 0.5 is above 0.4
    elsewhere = jsp.report(params, masks, plan, device="other")
    assert {leaf.speed for leaf in elsewhere.leaves} == {"unmeasured", "dense"}
    assert "bench_break_even" in str(elsewhere)


def test_the_table_of_the_wheel_names_every_pattern_on_a_cpu():
    measured = _break_even.break_even()["cpu"]
    for pattern in ("Unstructured", "NM", "Block", "Channel", "FanIn"):
        assert 0 <= measured[pattern]["density"] <= 1
        assert measured[pattern]["ratio_to_dense"]
    for size in (16, 32, 64, 128):
        limits = _break_even.block_limits((size, size), "cpu")
        assert limits is not None and 0 <= limits.faster <= limits.dense_above <= 1


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


SLAB = {
    "blocks": {
        "4": {"density": 0.25, "dense_above": 0.5},
        "8": {"density": 0.5, "dense_above": 0.75},
    }
}


@pytest.fixture
def slab(monkeypatch):
    """A device on which stored blocks of 4 and 8 were measured: this one."""
    here = jax.devices()[0].device_kind
    tables = {here: {"BlockSparse": SLAB}, "slab": {"BlockSparse": SLAB}}
    monkeypatch.setattr(_break_even, "break_even", lambda: tables)
    _break_even._say.cache_clear()


def test_the_largest_measured_block_that_fits_counts(slab):
    limits = _break_even.block_limits
    assert limits((4, 4), "slab").faster == limits((4, 8), "slab").faster == 0.25
    assert limits((128, 16), "slab").faster == 0.5
    assert limits((2, 64), "slab") is None and limits((4, 4), "other") is None


@pytest.fixture
def stored():
    """Four of 16 blocks of [16, 16], layers of blocks of 8 at a half, and a bias."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "up": jax.random.normal(keys[0], (16, 16)),
        "stack": jax.random.normal(keys[1], (2, 16, 16), jnp.bfloat16),
        "bias": jnp.ones(16),
    }
    plan = jsp.uniform(
        0.75, jsp.Block((4, 4)), overrides={"stack": jsp.LeafPlan(jsp.Block((8, 8)), 0.5)}
    )
    return jsp.blockify(params, plan)


def test_stored_blocks_by_hand(stored, slab):
    found = jsp.report(*stored, device="slab")
    leaves = {leaf.path: leaf for leaf in found.leaves}
    up, stack, bias = leaves["up"], leaves["stack"], leaves["bias"]
    assert (up.shape, up.pattern, up.kept, up.size) == ((16, 16), "BlockSparse 4 x 4", 64, 256)
    assert (up.flops_dense, up.flops_sparse, up.bytes_dense) == (512, 128, 1024)
    assert up.bytes_sparse == 4 * (64 + 4 * 4 + 2 * 5)  # values, 4 x S integers, C + 1 and R + 1
    assert (stack.shape, stack.kept, stack.size) == ((2, 16, 16), 256, 512)
    assert stack.bytes_sparse == 2 * 256 + 4 * 2 * (4 * 2 + 2 * 3)
    assert (up.speed, stack.speed, bias.speed) == ("faster", "faster", "dense")
    assert found.total.kept == 64 + 256 + 16 and found.total.size == 256 + 512 + 16
    assert {leaf.speed for leaf in jsp.report(*stored, device="other").leaves} == {
        "unmeasured",
        "dense",
    }


def test_spare_slots_cost_bytes_and_no_weights(slab):
    w = jsp.BlockSparse.from_dense(jnp.eye(16), (4, 4), capacity=10)
    found = jsp.report({"w": w}, device="slab")
    (leaf,) = found.leaves
    assert (leaf.path, leaf.kept, leaf.flops_sparse) == ("w", 64, 128)
    assert leaf.bytes_sparse == 4 * (10 * 16 + 4 * 10 + 2 * 5)
    assert leaf.speed == "only memory"  # a product costs what its slots cost: 10 of 16
    half = jsp.BlockSparse.random(jax.random.key(0), (16, 16), block=(4, 4), density=0.5)
    found = jsp.report([half], device="slab")
    assert found.leaves[0].speed == "only memory" and "not faster" in str(found)
    packed = jsp.NMPacked.from_dense(jnp.ones((8, 4)), 2, 4)
    (leaf,) = jsp.report([packed], device="slab").leaves
    assert (leaf.pattern, leaf.kept, leaf.size, leaf.speed) == ("NMPacked", 16, 32, "unmeasured")


def test_every_way_to_hold_stored_blocks_gives_the_same_rows(stored, slab):
    values, blocks = stored
    want = jsp.report(values, blocks, device="slab")
    probed = jsp.add_probes(values, blocks)
    updater = jsp.block_rigl(blocks, key=jax.random.key(0), when=jsp.once(9))
    state = jsp.sparsify(optax.sgd(0.1), updater).init(probed)
    assert str(jsp.report(probed, state.updater.blocks, device="slab")) == str(want)
    static = jsp.block_static(blocks)
    view = static.view(values, static.init(values))
    assert str(jsp.report(view, device="slab")) == str(want)

    model = nnx.Sequential(
        jsp.nn.SparseLinear(16, 16, block=(4, 4), density=0.25, rngs=nnx.Rngs(0)),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    )
    rows = {leaf.path: leaf for leaf in jsp.report(nnx.state(model), device="slab").leaves}
    assert set(rows) == {"layers/0/bias", "layers/0/values"}
    layer = dataclasses.replace(rows["layers/0/values"], path="up")
    assert layer == next(leaf for leaf in want.leaves if leaf.path == "up")


def test_blocks_that_do_not_fit_are_named(stored):
    values, blocks = stored
    with pytest.raises(ValueError, match=r"up has values .*slots \(4,\).* same blockify"):
        jsp.report({**values, "up": values["up"][:2]}, blocks)
    with pytest.raises(ValueError, match="3 leaves, but blocks has 2"):
        jsp.report(values, {"up": blocks["up"], "bias": True})


def counted(monkeypatch):
    """How often a product with stored blocks is traced."""
    from jaxsparse.formats import _block_sparse

    calls, inner = [], _block_sparse.block_sparse_matmul

    def count(*args, **options):
        calls.append(args)
        return inner(*args, **options)

    monkeypatch.setattr(_block_sparse, "block_sparse_matmul", count)
    return calls


@pytest.mark.parametrize("transposed", [False, True])
def test_beyond_break_even_the_dense_weight_is_made(transposed, slab, monkeypatch, caplog):
    calls = counted(monkeypatch)
    w = jsp.BlockSparse.random(jax.random.key(0), (16, 8), block=(4, 4), density=0.75)
    w = w.T if transposed else w
    x = jax.random.normal(jax.random.key(1), (3, w.shape[0]))

    def loss(values, x, dense_above):
        weight = dataclasses.replace(w, values=values, dense_above=dense_above)
        return jnp.sum((x @ weight) ** 2)

    both = jax.value_and_grad(loss, (0, 1))
    with caplog.at_level(logging.WARNING, "jaxsparse"):
        made = both(w.values, x, None)
        assert not calls
        both(w.values, x, None)
        (record,) = caplog.records  # said once
    assert "more than 50 % of its blocks of 4 x 4" in record.getMessage()
    assert "dense_above=1" in record.getMessage()
    stored = both(w.values, x, 1.0)
    assert len(calls) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), made, stored)
    assert made[1][0].shape == w.values.shape  # a gradient at the stored blocks alone


def test_where_nothing_was_measured_blocks_are_used_and_either_can_be_forced(slab, monkeypatch):
    calls = counted(monkeypatch)
    x = jnp.ones((2, 16))
    full = jsp.BlockSparse.random(jax.random.key(0), (16, 8), block=(2, 2), density=1.0)
    x @ full
    assert len(calls) == 1
    x @ dataclasses.replace(full, dense_above=0.9)
    assert len(calls) == 1

    def layer(**options):
        return jsp.nn.SparseLinear(16, 16, block=(4, 4), density=0.75, rngs=nnx.Rngs(0), **options)

    layer()(x)
    assert len(calls) == 1
    layer(dense_above=1)(x)
    assert len(calls) == 2
