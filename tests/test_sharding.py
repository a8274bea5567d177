"""Sharded over 8 devices: masks lie where their weights lie, and no weight is ever gathered.

Meshes with automatic axes and with explicit ones (the default of `jax.make_mesh`), with the mesh
set as the context and without.
"""

import contextlib
import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as jsp
from tests.conformance.lists import PATTERNS, UPDATERS, fast_jit, make_updater

SPECS = {"kernel": P("x", "y"), "bias": P("y"), "stack": P(None, "x", "y")}
SHAPES = {"kernel": (32, 64), "bias": (64,), "stack": (2, 32, 32)}
MODES = {
    "auto": (AxisType.Auto, False),
    "explicit": (AxisType.Explicit, False),
    "auto_set": (AxisType.Auto, True),
    "explicit_set": (AxisType.Explicit, True),
}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all|collective-permute)(-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def weights():
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        order = np.random.default_rng(i).permutation(math.prod(shape)).astype(np.float32)
        made[name] = jnp.asarray((np.where(order % 2, 1, -1) * (1 + order) / 2048).reshape(shape))
    return made


@contextlib.contextmanager
def on_mesh(mode, devices):
    axis_type, as_context = MODES[mode]
    mesh = jax.make_mesh((2, 4), ("x", "y"), (axis_type, axis_type), devices=devices)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    with jax.set_mesh(mesh) if as_context else contextlib.nullcontext():
        yield shardings


def moved(text):
    """Entries of the largest array that a collective of the program moves as a whole."""
    shapes = (SHAPE.findall(result) for result, *_ in COLLECTIVE.findall(text))
    sizes = [math.prod(map(int, filter(None, s.split(",")))) for s in itertools.chain(*shapes)]
    return max(sizes, default=0)


def assert_masks_lie_as(masks, shardings, what):
    for name, mask in masks.items():
        if mask.ndim:
            here, there = mask.sharding, shardings[name]
            assert here.is_equivalent_to(there, mask.ndim), f"{what}: {name} lies as {here}"


def gradients(view, params, t):
    return jax.tree.map(lambda v, w: v / 2 + jnp.sin(37 * w + t), view, params)


def training(updater, packed):
    tx = jsp.sparsify(optax.adam(1e-2), updater, packed=packed)

    def step(params, state, t):
        grads = gradients(updater.view(params, state.updater), params, t)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


# Each updater on automatic and on explicit axes; pattern, packing and context take turns.
ROWS = [
    (updater, pattern, f"{mode}{suffix}", packed)
    for i, (updater, pattern) in enumerate(zip(UPDATERS, itertools.cycle(PATTERNS), strict=False))
    for mode, suffix, packed in zip(
        ("auto", "explicit"),
        (("", "_set") if i % 2 else ("_set", "")),
        ((i % 4 < 2), (i % 4 >= 2)),
        strict=True,
    )
]
# What is computed from the step and used in a selection, in a mesh that is the context.
ROWS += [(name, "unstructured", "explicit_set", False) for name in ("rigl", "gradual_lamp")]


@pytest.mark.parametrize(("updater", "pattern", "mode", "packed"), ROWS)
def test_training(updater, pattern, mode, packed, devices):
    plain = weights()
    built, _ = make_updater(updater, PATTERNS[pattern], plain)
    tx, step = training(built, packed)
    alone = fast_jit(step)
    params, state = plain, tx.init(plain)
    start, want = jsp.masks(state), []
    for t in range(3):
        params, state = alone(params, state, jnp.float32(t))
        want.append((params, jsp.masks(state)))

    with on_mesh(mode, devices) as shardings:
        params = jax.device_put(plain, shardings)
        # `fixed` is given masks: they lie wherever the user put them.
        built, _ = make_updater(updater, PATTERNS[pattern], params)
        tx, step = training(built, packed)
        # What does not depend on the weights jit puts on one device (Adam's moments too).
        inits = [tx.init, fast_jit(tx.init)] if UPDATERS[updater].drawn else [tx.init]
        for init in reversed(inits):
            state = init(params)
            assert_masks_lie_as(jsp.masks(state), shardings, "init")
            jax.tree.map(np.testing.assert_array_equal, jsp.masks(state), start)
        if packed:
            assert state.updater.masks["kernel"].dtype == jnp.uint8
            assert_masks_lie_as(state.updater.masks, shardings, "packed")
        compiled = fast_jit(step).lower(params, state, jnp.float32(0)).compile()
        assert moved(compiled.as_text()) < min(math.prod(SHAPES[k]) for k in ("kernel", "stack"))
        for t in range(3):
            params, state = compiled(params, state, jnp.float32(t))
            assert_masks_lie_as(jsp.masks(state), shardings, f"step {t}")
            assert_masks_lie_as(params, shardings, f"weights of step {t}")
            assert_masks_lie_as(state.inner[0].mu, shardings, f"moments of step {t}")
            jax.tree.map(np.testing.assert_array_equal, jsp.masks(state), want[t][1])
            rounding = 1e-6 if UPDATERS[updater].sums else 0
            alike = partial(np.testing.assert_allclose, rtol=rounding, atol=0)
            jax.tree.map(alike, params, want[t][0])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", MODES)
def test_make_mask(pattern, mode, devices):
    plain = weights()["stack"]
    want = jsp.make_mask(PATTERNS[pattern], plain, 0.25)
    with on_mesh(mode, devices) as shardings:
        scores = jax.device_put(plain, shardings["stack"])
        mask = jsp.make_mask(PATTERNS[pattern], scores, 0.25)
        assert_masks_lie_as({"stack": mask}, shardings, "make_mask")
        np.testing.assert_array_equal(mask, want)
        make = fast_jit(jsp.make_mask, static_argnums=0)
        text = make.lower(PATTERNS[pattern], scores, jnp.float32(0.25)).compile().as_text()
        assert moved(text) < plain.size


def test_what_counts_as_moved():
    text = """
      %a = f32[2,64]{1,0} all-gather(%b), dimensions={0}
      %c = (pred[2,32]{1,0}, pred[2,32,32]{2,1,0}) all-gather-start(%d), dimensions={0}
      %e = s32[99999]{0} all-reduce(%f)
    """
    assert moved(text) == 2048 and moved("%e = s32[] add(%f)") == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_gathered_weight_would_be_found(mode, devices):
    with on_mesh(mode, devices) as shardings:
        w = jax.device_put(weights()["kernel"], shardings["kernel"])
        whole = NamedSharding(w.sharding.mesh, P())
        gather = jax.jit(lambda w: w * 2, out_shardings=whole)
        if MODES[mode][0] is AxisType.Explicit:
            gather = jax.jit(lambda w: jax.sharding.reshard(w, whole) * 2)
        assert moved(gather.lower(w).compile().as_text()) >= w.size


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_leaf_whose_bytes_do_not_divide_stays_bool(mode, devices):
    with on_mesh(mode, devices) as shardings:
        mask = jax.device_put(
            jnp.ones((8, 4), bool), shardings["kernel"]
        )  # 1 byte row on 2 devices
        assert jsp.pack_masks([mask])[0].dtype == bool


def test_checks_and_measures_of_sharded_masks(devices):
    with on_mesh("explicit", devices) as shardings:
        params = jax.device_put(weights(), shardings)
        pruned, masks = jsp.prune(params, jsp.uniform(0.75))
        assert_masks_lie_as(pruned, shardings, "pruned")
        assert float(jsp.density(masks)) == 0.25
        assert float(jsp.churn(masks, masks)) == 0 and float(jsp.overlap(masks, masks)) == 1
        jsp.check(pruned, jsp.sparsify(optax.sgd(0.1), jsp.fixed(masks)).init(params))
