"""What a run writes: records, costs, tables and plots, on records made by hand."""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments import options as o
from experiments import plots, table
from experiments.arm import by_layer, fill_fan_in
from experiments.log import Display, Metrics, clock, read_metrics
from models.flops import training_flops

OPTIONS = o.Options(model=o.Model(model="tiny", context=16), training=o.Training(steps=10, batch=2))
UP = "layers/mlp/up/kernel"


def record(step, kept=0.5, churn=0.1):
    return {
        "step": step,
        "loss": 3.0 - 0.1 * step,
        "learning_rate": 1e-3,
        "sparsity": {UP: [1 - kept, 1 - kept]},
        "churn": {UP: [churn, churn / 2]},
        "valid_bits_per_byte": 4.0,
    }


def test_metrics_are_cut_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')  # torn by a kill
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    with Metrics(path, done=2) as metrics:
        metrics.write({"step": 3, "loss": 1.0})
    assert read_metrics(path) == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 1.0},
    ]


def test_by_layer_counts_each_layer_and_leaves_dense_leaves_out():
    old = {"w": jnp.array([[[1, 1, 0, 0]], [[1, 1, 1, 1]]], bool), "scale": jnp.array(True)}
    new = {"w": jnp.array([[[1, 0, 1, 0]], [[1, 0, 0, 0]]], bool), "scale": jnp.array(True)}
    found = by_layer(old, new)
    assert set(found) == {"w"}
    np.testing.assert_allclose(found["w"][0], [0.5, 0.75])
    np.testing.assert_allclose(found["w"][1], [0.5, 0])


def test_fresh_sparse_weights_give_outputs_of_the_dense_variance():
    key, masks = jax.random.key(0), jax.random.bernoulli(jax.random.key(1), 0.1, (2, 512, 256))
    weight = jax.random.normal(key, (2, 512, 256)) / 512**0.5
    x = jax.random.normal(key, (64, 512))
    filled = fill_fan_in(weight * masks, masks)
    assert float((x @ filled).std()) == pytest.approx(1, rel=0.03)
    assert fill_fan_in(weight, jnp.array(True)) is weight
    assert not np.any(fill_fan_in(weight * 0, jnp.zeros_like(masks)))


def test_flops_follow_the_sparsity_in_the_records():
    dense = sum(training_flops(o.model_config(OPTIONS)).values())
    half = sum(training_flops(o.model_config(OPTIONS), {UP: 0.5}).values())
    tokens = 2 * 16
    assert table.run_flops(OPTIONS, [], "dense") == 10 * tokens * dense
    marks = [record(1), record(6, kept=1.0)]
    assert table.run_flops(OPTIONS, marks, "static") == tokens * (5 * half + 5 * dense)
    ste = table.run_flops(OPTIONS, [record(1)], "ste")
    assert ste == pytest.approx(10 * tokens * (half + (dense - half) / 3))
    rigl = table.run_flops(OPTIONS, [record(1)], "rigl")
    extra = OPTIONS.sparse.until / OPTIONS.sparse.every * (dense - half) / 3
    assert rigl == pytest.approx(10 * tokens * (half + extra))


def test_parameters_that_are_kept():
    kept, size = table.parameters(OPTIONS, [record(1)])
    assert size - kept == 2 * 128 * 352 / 2
    assert table.parameters(OPTIONS, []) == (size, size)


def test_tree_bytes_of_shapes():
    tree = {"a": jax.ShapeDtypeStruct((3, 4), jnp.float32), "b": jnp.zeros(8, jnp.uint8)}
    assert table.tree_bytes(tree) == 56


def facts(name, **more):
    return {
        "name": name,
        "kept": 100,
        "parameters": 1000,
        "flops": 2e9,
        "step_ms": 12.0,
        "optimizer_bytes": 5_000_000,
        "held_bytes": 8_000_000,
        "temporary_bytes": 3_000_000,
        "valid_bits_per_byte": 2.5,
        "valid_loss": 2.5 * math.log(2),
        **more,
    }


def text_of(*parts):
    console = Console(width=100, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def test_the_table_says_how_to_get_what_it_lacks():
    dense = facts("dense", kept=1000)
    shown = text_of(table.comparison(facts("rigl"), dense))
    assert "0.100" in shown and "2.500" in shown and "--compare" not in shown
    del dense["valid_bits_per_byte"], dense["valid_loss"]
    shown = text_of(table.comparison(facts("rigl"), dense))
    assert shown.count("with --compare") == 2


def test_baselines_are_sorted_and_name_the_model():
    shown = text_of(table.baselines_table(facts("rigl"), {"name": "dense"}, {"gzip": 2.7, "xz": 2}))
    assert shown.index("gzip") < shown.index("rigl") < shown.index("xz")
    assert "dense" not in shown


def test_the_table_is_honest_about_masks():
    lines = " ".join(table.honest_lines(facts("rigl", step_ms=13.0), facts("dense"), "cpu"))
    assert "on paper" in lines and "1.08" in lines and "cpu" in lines


@pytest.mark.parametrize("layers", [1, 2, 24])
def test_plots_are_pictures(tmp_path, layers):
    records = [record(step) for step in (1, 3, 5, 9)]
    for r in records:
        r["sparsity"] = {f"layers/{n}/kernel": [0.9] * layers for n in "abcdefg"}
        r["churn"] = {name: [0.1] * layers for name in r["sparsity"]}
    plots.plot_loss(tmp_path / "loss.png", {"rigl": records, "dense": records}, {"gzip": 2.7})
    plots.plot_masks(tmp_path / "masks.png", records)
    for name in ("loss.png", "masks.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size[0] > 800 and np.asarray(image).std() > 5


def test_a_run_of_one_step_can_be_plotted(tmp_path):
    plots.plot_loss(tmp_path / "loss.png", {"rigl": [record(1)]}, {})
    plots.plot_masks(tmp_path / "masks.png", [record(1)])
    assert (tmp_path / "masks.png").stat().st_size > 1000


def test_smoothing_starts_without_bias():
    np.testing.assert_allclose(plots.smooth(np.full(500, 3.0)), 3.0)
    rough = np.random.default_rng(0).normal(size=500)
    assert plots.smooth(rough)[100:].std() < 0.5 * rough.std()


def test_plain_lines_without_a_terminal(capsys):
    console = Console(width=100)
    with Display(console, "rigl", total=4, done=1, tokens=32, interval=0.0) as display:
        display.sparsity = 0.9
        for step in (2, 3, 4):
            display.loss(2.0)
            display.step(step)
    out = capsys.readouterr().out
    assert "rigl: going on after step 1 of 4" in out
    assert "rigl step 4/4  loss 2.000" in out and "sparsity 90.0%" in out and "0:00 left" in out
    assert display.rate > 0 and "\x1b" not in out


def test_clock():
    assert [clock(x) for x in (None, 5, 65, 3700)] == ["-:--", "0:05", "1:05", "1:01:40"]
