"""Names on the command line: each algorithm, pattern, distribution builds; errors come early."""

import dataclasses
import typing

import jax
import pytest

from experiments import options as o
from experiments.arm import make_arm

TINY = o.Options(model=o.Model(model="tiny", context=16), training=o.Training(steps=8, batch=2))


def sparse(**changes):
    return dataclasses.replace(TINY, sparse=o.Sparsity(**{"algorithm": "rigl", **changes}))


def parse(*arguments):
    return o.parse(list(arguments))


@pytest.mark.parametrize(
    ("registry", "cls", "field"),
    [
        ({**o.ALGORITHMS, **o.STORED, "dense": None}, o.Sparsity, "algorithm"),
        (o.PATTERNS, o.Sparsity, "pattern"),
        (o.DISTRIBUTIONS, o.Sparsity, "distribution"),
        (o.SIZES, o.Model, "model"),
    ],
)
def test_the_command_line_offers_what_there_is(registry, cls, field):
    choices = typing.get_type_hints(cls)[field]
    if type(None) in typing.get_args(choices):  # none: what suits the rest
        choices = typing.get_args(choices)[0]
    assert set(typing.get_args(choices)) == set(registry)


@pytest.mark.parametrize(
    "changes",
    [
        *({"algorithm": name} for name in o.ALGORITHMS),
        *({"pattern": name, "block": (8, 8)} for name in o.PATTERNS if name != "unstructured"),
        *({"distribution": name} for name in o.DISTRIBUTIONS if name != "uniform"),
        {"algorithm": "sr_ste", "pattern": "nm", "nm": (1, 4)},
        *({"algorithm": name, "block": (16, 16)} for name in o.STORED),
    ],
    ids=str,
)
def test_every_choice_builds_and_prunes_the_matrices_only(changes):
    options = sparse(**changes)
    arm = make_arm(options, options.sparse.algorithm)
    masks = jax.eval_shape(lambda: arm.masks(arm.init()[1]))
    for path, mask in jax.tree_util.tree_leaves_with_path(masks):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert bool(mask.ndim) == (name.startswith("layers/") and "kernel" in name)


def test_flags_have_no_prefix():
    found = parse("--algorithm", "ste", "--pattern", "nm", "--nm", "1", "4", "--steps", "7")
    assert found.sparse.nm == (1, 4) and found.training.steps == 7
    assert o.target_sparsity(found.sparse) == 0.75


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for group in (o.Model, o.Training, o.Sparsity, o.Output):
        for field in dataclasses.fields(group):
            assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1.0"], "--sparsity must be in [0, 1); got 1.0"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--every", "0"], "--every must be at least 1; got 0"),
        (["--context", "0"], "--context must be at least 1; got 0"),
        (["--until", "1.5"], "--until must be in [0, 1]; got 1.5"),
        (["--width", "0"], "--width must be at least 1; got 0"),
        (
            ["--algorithm", "rigl", "--pattern", "nm", "--sparsity", "0.9"],
            "leave --sparsity out",
        ),
        (["--pattern", "nm"], "block_set stores blocks: leave --pattern out"),
    ],
)
def test_errors_say_flag_value_and_rule(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    output = "".join(capsys.readouterr()).replace("│", "")
    assert " ".join(words.split()) in " ".join(output.split())


def test_a_pattern_that_does_not_fit_is_found_before_any_work():
    with pytest.raises(ValueError, match="NM"):
        make_arm(sparse(pattern="nm", nm=(2, 7)), "rigl")


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    schedule = o.learning_rate(o.Training(steps=100, learning_rate=1.0, warmup=0.1))
    assert schedule(0) == 0 and float(schedule(10)) == 1
    assert float(schedule(100)) == pytest.approx(0.1)
    assert all(float(schedule(t)) >= float(schedule(t + 1)) for t in range(10, 100, 10))


def test_a_dense_run_does_not_depend_on_the_options_of_sparsity():
    a, b = sparse(every=5), sparse(every=7)
    assert o.identity(a, "x", "dense") == o.identity(b, "x", "dense")
    assert o.identity(a, "x", "rigl") != o.identity(b, "x", "rigl")
