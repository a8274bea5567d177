"""Every mistake gets one error that names the leaf, the value, the rule and the mend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp

KEY = jax.random.key(0)
HALF = jsp.uniform(0.5)
ALWAYS = jsp.every(1)
PARAMS = {"layers": [{"up": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}]}
UP = "layers/0/up/kernel"
W = {"w": jnp.ones((4, 4))}
MASK = {"w": jnp.ones((4, 4), bool)}


def trained(updater=None):
    """An optimizer with its state."""
    tx = jsp.sparsify(optax.adam(1e-3), updater or jsp.static(HALF, key=KEY))
    return tx, tx.init(W)


def step(updater):
    tx, state = trained(updater)
    return tx.update(W, state, W)


# call, type, words of the message
ERRORS = {
    # Sparsities
    "90 for 0.9": (lambda: jsp.uniform(90), ValueError, ["[0, 1)", "got 90", "0.9"]),
    "sparsity 1": (lambda: jsp.uniform(1.0), ValueError, ["[0, 1)", "got 1.0"]),
    "negative": (lambda: jsp.erk(-0.1), ValueError, ["[0, 1)", "-0.1"]),
    "not a number": (lambda: jsp.global_(float("nan")), ValueError, ["[0, 1)", "nan"]),
    "a bool": (lambda: jsp.lamp(True), ValueError, ["[0, 1)", "True"]),
    "in a leaf plan": (
        lambda: jsp.LeafPlan(jsp.Unstructured(), 1.5),
        ValueError,
        ["[0, 1)", "1.5"],
    ),
    "90 for all leaves together": (lambda: jsp.global_(90), ValueError, ["[0, 1)", "90", "0.9"]),
    "in overrides": (
        lambda: jsp.uniform(0.5, overrides={"*/kernel": 2}),
        ValueError,
        ["overrides", "*/kernel", "[0, 1)", "got 2"],
    ),
    "a density": (
        lambda: jsp.make_mask(jsp.Unstructured(), W["w"], 1.5),
        ValueError,
        ["density", "0 to 1", "1.5"],
    ),
    "floor above density": (
        lambda: jsp.global_(0.9, floor=0.2),
        ValueError,
        ["floor", "1 - sparsity = 0.1", "0.2"],
    ),
    "negative floor": (lambda: jsp.lamp(0.9, floor=-0.1), ValueError, ["floor", "-0.1"]),
    # Patterns
    "more kept than there are": (lambda: jsp.NM(5, 4), ValueError, ["n of m", "n=5, m=4"]),
    "none kept": (lambda: jsp.NM(0, 4), ValueError, ["0 < n", "n=0"]),
    "an axis from the front": (lambda: jsp.NM(2, 4, axis=0), ValueError, ["-2", "-1", "got 0"]),
    "an empty block": (lambda: jsp.Block((0, 4)), ValueError, ["positive", "(0, 4)"]),
    "a block of three": (lambda: jsp.Block((2, 2, 2)), ValueError, ["two", "(2, 2, 2)"]),
    "a channel from the front": (lambda: jsp.Channel(0), ValueError, ["from the end", "got 0"]),
    "a channel too far": (lambda: jsp.Channel(-3), ValueError, ["-2 to -1", "got -3"]),
    "N:M that does not divide": (
        lambda: jsp.uniform(0.5, jsp.NM(2, 4))(PARAMS),
        ValueError,
        [UP, "NM(2, 4)", "axis -2", "multiple of 4", "(6, 4)", "axis=-1", "where="],
    ),
    "in prune": (
        lambda: jsp.prune(PARAMS, jsp.uniform(0.5, jsp.NM(2, 4))),
        ValueError,
        [UP, "NM(2, 4)", "multiple of 4", "where="],
    ),
    "in init": (
        lambda: jsp.sparsify(optax.sgd(1.0), jsp.ste(jsp.uniform(0.5, jsp.NM(2, 4)))).init(PARAMS),
        ValueError,
        [UP, "NM(2, 4)", "multiple of 4", "where="],
    ),
    "blocks that do not divide": (
        lambda: jsp.erk(0.5, jsp.Block((4, 4)))(PARAMS),
        ValueError,
        [UP, "Block", "(4, 4)", "(6, 4)", "where="],
    ),
    "too few axes": (
        lambda: jsp.uniform(0.5, overrides={"*/bias": 0.5})(PARAMS),
        ValueError,
        ["layers/0/up/bias", "at least 2 axes", "(4,)", "where="],
    ),
    "make_mask that does not divide": (
        lambda: jsp.make_mask(jsp.NM(2, 4), jnp.ones((6, 4)), 0.5),
        ValueError,
        ["NM(2, 4)", "multiple of 4", "(6, 4)"],
    ),
    # Paths
    "unknown glob": (
        lambda: jsp.uniform(0.5, where="layers/0/up/kernal")(PARAMS),
        ValueError,
        ["where", "layers/0/up/kernal", "matches no leaf", "Near: " + UP],
    ),
    "a name without its path": (
        lambda: jsp.uniform(0.5, where="kernel")(PARAMS),
        ValueError,
        ["where", "'kernel'", UP, "*/kernel"],
    ),
    "unknown override": (
        lambda: jsp.erk(0.5, overrides={"*/biass": 0.0})(PARAMS),
        ValueError,
        ["overrides", "*/biass", "Near: layers/0/up/bias"],
    ),
    "a predicate of nothing": (
        lambda: jsp.uniform(0.5, where=lambda path, leaf: False)(PARAMS),
        ValueError,
        ["where", "predicate", "matches no leaf", UP],
    ),
    # Dtypes
    "integers by where": (
        lambda: jsp.uniform(0.5, where="*")({"ids": jnp.ones((4, 4), jnp.int32)}),
        TypeError,
        ["ids", "int32", "floating-point", "where=", "overrides"],
    ),
    "integers by override": (
        lambda: jsp.prune(
            {**W, "ids": jnp.ones((4, 4), jnp.int8)}, jsp.uniform(0.5, overrides={"ids": 0.5})
        ),
        TypeError,
        ["ids", "int8", "where="],
    ),
    "complex leaves": (
        lambda: HALF({"f": {"w": jnp.ones((4, 4), jnp.complex64)}}),
        TypeError,
        ["f/w", "complex64", "where="],
    ),
    "complex scores": (
        lambda: jsp.make_mask(jsp.Unstructured(), jnp.ones((4, 4), jnp.complex64), 0.5),
        TypeError,
        ["complex64", "jnp.abs"],
    ),
    # Masks
    "masks of another structure": (
        lambda: jsp.apply_masks(PARAMS, MASK),
        ValueError,
        ["masks", "layers/0/up/bias"],
    ),
    "a mask too many": (
        lambda: jsp.apply_masks(W, {**MASK, "v": jnp.array(True)}),
        ValueError,
        ["masks", "a leaf v", "lack"],
    ),
    "a mask of another shape": (
        lambda: jsp.apply_masks(W, {"w": jnp.ones((4, 5), bool)}),
        ValueError,
        ["mask of w", "(4, 5)", "(4, 4)"],
    ),
    "a mask larger than its weight": (
        lambda: jsp.apply_masks(W, {"w": jnp.ones((2, 4, 4), bool)}),
        ValueError,
        ["mask of w", "(2, 4, 4)", "(4, 4)"],
    ),
    "a mask that is not bool": (
        lambda: jsp.apply_masks(W, {"w": jnp.ones((4, 4))}),
        ValueError,
        ["mask of w", "bool", "float32", "!= 0"],
    ),
    "fixed masks of another shape": (
        lambda: trained(jsp.fixed({"w": jnp.ones((4, 5), bool)})),
        ValueError,
        ["mask of w", "(4, 5)", "(4, 4)"],
    ),
    "fixed masks that are not bool": (
        lambda: trained(jsp.fixed({"w": jnp.ones((4, 4), int)})),
        ValueError,
        ["mask of w", "bool", "int32"],
    ),
    "fixed masks of another tree": (
        lambda: trained(jsp.fixed({"v": jnp.ones((4, 4), bool)})),
        ValueError,
        ["masks", "no leaf for w"],
    ),
    "fixed masks too few": (
        lambda: jsp.sparsify(optax.sgd(1.0), jsp.fixed({})).init(W),
        ValueError,
        ["masks", "no leaf for w"],
    ),
    "density of other parameters": (
        lambda: jsp.density(MASK, {"w": jnp.ones((2, 2))}),
        ValueError,
        ["mask of w", "(4, 4)", "(2, 2)"],
    ),
    "churn of other masks": (
        lambda: jsp.churn(MASK, {"v": MASK["w"]}),
        ValueError,
        ["second masks", "no leaf for w"],
    ),
    # Evidence
    "no gradient": (
        lambda: jsp.prune(W, HALF, jsp.snip),
        ValueError,
        ["snip", "needs grad=", "prune(params, distribution, score, grad=...)"],
    ),
    "no key": (lambda: jsp.prune(W, HALF, jsp.random), ValueError, ["random", "needs key="]),
    "evidence of another tree": (
        lambda: jsp.prune(W, HALF, jsp.gradient, grad={"v": W["w"]}),
        ValueError,
        ["grad=", "no leaf for w"],
    ),
    "no fisher in update": (
        lambda: step(jsp.gradual(HALF, schedule=jsp.constant(), when=ALWAYS, score=jsp.fisher)),
        ValueError,
        ["fisher", "needs fisher=", "tx.update(grads, state, params, fisher=...)"],
    ),
    # Updaters
    "neither key nor score": (lambda: jsp.static(HALF), ValueError, ["key=", "score=", "neither"]),
    "key and score": (
        lambda: jsp.static(HALF, key=KEY, score=jsp.magnitude),
        ValueError,
        ["key=", "score=", "both"],
    ),
    "drop more than all": (
        lambda: jsp.rigl(HALF, key=KEY, when=ALWAYS, drop_fraction=1.5),
        ValueError,
        ["drop_fraction", "0 to 1", "1.5"],
    ),
    "drop less than none": (
        lambda: jsp.set_(HALF, key=KEY, when=ALWAYS, drop_fraction=-0.1),
        ValueError,
        ["drop_fraction", "0 to 1", "-0.1"],
    ),
    "negative decay": (lambda: jsp.sr_ste(HALF, decay=-1.0), ValueError, ["decay", ">= 0", "-1.0"]),
    # Schedules
    "end before begin": (lambda: jsp.cubic(5, 3), ValueError, ["begin <= end", "begin=5, end=3"]),
    "begin before 0": (lambda: jsp.linear(-1, 3), ValueError, ["0 <= begin", "begin=-1"]),
    "a share of 2": (lambda: jsp.constant(2.0), ValueError, ["0 to 1", "2.0"]),
    "every 0": (lambda: jsp.every(0), ValueError, ["k >= 1", "k=0"]),
    "a start before 0": (lambda: jsp.every(2, start=-1), ValueError, ["start >= 0", "start=-1"]),
    # sparsify
    "params are missing": (
        lambda: trained()[0].update(W, trained()[1]),
        ValueError,
        ["needs the parameters", "tx.update(grads, state, params)"],
    ),
    "nested": (
        lambda: jsp.sparsify(trained()[0], jsp.static(HALF, key=KEY)).init(W),
        ValueError,
        ["nested", "overrides", "multi_transform"],
    ),
    "nested in a chain": (
        lambda: jsp.sparsify(
            optax.chain(optax.identity(), trained()[0]), jsp.static(HALF, key=KEY)
        ).init(W),
        ValueError,
        ["nested", "overrides"],
    ),
    "lookahead inside": (
        lambda: trained()[0].init(optax.LookaheadParams.init_synced(W)),
        ValueError,
        ["LookaheadParams", "optax.lookahead(jsp.sparsify(...), ...)"],
    ),
    "no sparsify in a state": (
        lambda: jsp.masks(optax.adam(1e-3).init(W)),
        ValueError,
        ["no sparsify", "jsp.sparsify(inner, updater)"],
    ),
    "check before the first step": (
        lambda: jsp.check(W, trained()[1]),
        ValueError,
        ["w has 8 weights", "not zero off its mask", "apply_masks"],
    ),
    "check of other parameters": (
        lambda: jsp.check(PARAMS, trained()[1]),
        ValueError,
        ["masks of this state", "layers/0/up"],
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_message(call, kind, words):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and len(message) < 400


def test_rescaling_outside_is_caught_by_check():
    tx = optax.chain(
        jsp.sparsify(optax.sgd(0.1), jsp.static(HALF, score=jsp.magnitude)), optax.scale(0.5)
    )
    params = {"a": jnp.zeros((2, 2)), "b": {"w": jnp.arange(1.0, 17).reshape(4, 4)}}
    updates, state = tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="b/w has 8 weights .* move it inside"):
        jsp.check(optax.apply_updates(params, updates), state)


def test_errors_come_while_tracing_too():
    with pytest.raises(ValueError, match="multiple of 4"):
        jax.eval_shape(lambda p: jsp.prune(p, jsp.uniform(0.5, jsp.NM(2, 4))), PARAMS)


def test_a_group_beyond_int32_is_refused_before_any_work():
    huge = jax.ShapeDtypeStruct((2**16, 2**15), np.float32)
    with pytest.raises(ValueError, match=r"2147483648 scores .* leading stacked axis"):
        jax.eval_shape(lambda s: jsp.make_mask(jsp.Unstructured(), s, 0.5), huge)
