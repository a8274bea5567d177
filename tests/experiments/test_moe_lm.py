"""The experiment on experts: the fit of laws, what pruning watches, and a run of a few steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import moe_lm, moe_training
from experiments.arm import bits_per_byte
from experiments.expert_pruning import best, counts_of, watch
from experiments.loop import Interrupted, Stop
from experiments.moe_costs import costs
from experiments.moe_lm_report import write_report
from experiments.moe_training import Plan, flops, held_out, make_arm, parameters, train
from experiments.power_law import CHINCHILLA, SPARSITY, Law, fit_law
from experiments.sparsity_law import fits, law_config
from jaxsparse import moe
from models.moe import Config, MoETransformer

TEXT = "we will work and hope that all of this may come to pass for the people of the land. "
TINY = "--seeds 1 --width 8 --hidden 4 --experts 4 --chosen 2 --copies 2 --steps 4 --extra 4"
TINY += " --law-widths 16 --law-experts 2 --law-steps 4 --context 16 --batch 2 --limit 4"


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """These programs run for a moment and take seconds to compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 60)
    return path


def grid(noise=0.0):
    n, d, s = np.meshgrid(
        np.logspace(6, 10, 6), np.logspace(8, 12, 6), [0, 0.5, 0.75, 0.875, 0.95, 0.98]
    )
    data = {"N": n.ravel(), "D": d.ravel(), "1-S": 1 - s.ravel()}
    law = Law(
        SPARSITY,
        (60.0, 400.0, 0.3, 20.0, 1.0),
        ((0.35,), (0.3,), (-0.3,), (0.2, 0.15), ()),
        0.0,
    )
    draws = np.random.default_rng(0).normal(size=n.size)
    return law, data, law(data) * np.exp(noise * draws)


def test_known_coefficients_come_back():
    law, data, loss = grid()
    found = fit_law(SPARSITY, data, loss, starts=6)
    np.testing.assert_allclose(found.scales, law.scales, rtol=1e-4)
    for got, want in zip(found.powers, law.powers, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    # A law without sparsity cannot do it, and says so.
    assert fit_law(CHINCHILLA, data, loss, starts=2).error > 0.05 > 1e-6 > found.error


def test_noise_stays_in_the_error_and_far_points_hardly_count():
    law, data, loss = grid(noise=2e-3)
    found = fit_law(SPARSITY, data, loss, starts=6)
    assert found.error == pytest.approx(2e-3, rel=0.2)
    assert found.off(data, law(data)) < 1e-3
    wrong = loss.copy()
    wrong[::40] *= 1.5
    assert fit_law(SPARSITY, data, wrong, starts=6).off(data, law(data)) < 2e-3


def test_bad_data_is_named():
    _, data, loss = grid()
    few = {name: x[:9] for name, x in data.items()}
    with pytest.raises(ValueError, match="10 coefficients need as many points; got 9"):
        fit_law(SPARSITY, few, loss[:9])
    with pytest.raises(ValueError, match="positive"):
        fit_law(SPARSITY, data, loss - 2 * loss.max())


def test_fits_foretell_the_experts_left_out():
    _, data, loss = grid()
    points = [
        {"N": n, "active": n * s, "D": d, "1-S": s, "experts": round(1 / s), "loss": y}
        for n, d, s, y in zip(data["N"], data["D"], data["1-S"], loss, strict=True)
    ]
    found = fits(points, 50, starts=3)
    assert found["sparsity"]["foretold"] < 1e-4 < found["all parameters"]["foretold"]


def test_models_that_are_compared_cost_what_they_should():
    models = moe_lm.configs(moe_lm.Options())
    dense, experts, wide = (models[name] for name in ("dense", "experts", "wide dense"))
    assert flops(dense) < flops(experts) < 1.03 * flops(dense)  # the router
    assert parameters(wide) == pytest.approx(parameters(experts), rel=0.01)
    sizes = [parameters(law_config(16, e, 64), blocks=True) for e in (2, 4, 8)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 0
    assert flops(law_config(16, 16, 64)) < 1.2 * flops(law_config(16, 2, 64))


def test_the_rate_warms_up_and_falls():
    plan = Plan(0, 100)
    assert plan.rate(0) == 0.05 and plan.rate(50) == 1 and plan.rate(90) == 0.5
    assert plan.rate(99) == 0.1 and plan._replace(decay=False).rate(99) == 1


def test_counts_and_the_best_of_each_layer():
    assert counts_of(16) == [16, 12, 9, 6, 4, 3, 2, 1] and counts_of(1) == [1]
    scores = jnp.array([[0.1, 0.5, 0.5], [0.9, 0.0, 0.2]])
    np.testing.assert_array_equal(best(scores, 1), [[0, 1, 0], [1, 0, 0]])


def test_watching_sees_what_the_model_does():
    config = Config(
        width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=8, experts=4, chosen=2,
        shared=8, router=moe.token_choice(2),
    )  # fmt: skip
    model = MoETransformer(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 256)
    seen, logits = nnx.jit(watch)(model, tokens)
    routed = nnx.jit(lambda m, t: m(t)[1])(model, tokens)
    np.testing.assert_allclose(seen.hits / 32, routed.statistics.load, atol=1e-6)
    chosen = jax.lax.top_k(logits, 2)[1]
    np.testing.assert_array_equal(chosen, routed.routing.experts)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "moe"
    arguments = [*TINY.split(), "--out", str(out), "--data", str(text)]
    said = {"step_ms": 3.0, "tokens_per_second_1": 10.0, "tokens_per_second_16": 20.0}
    with pytest.MonkeyPatch.context() as patch:  # measured in a test of its own
        patch.setattr(moe_lm, "costs", lambda models, *_: {name: dict(said) for name in models})
        assert moe_lm.main(arguments) == 0
    return out, arguments


def test_a_run_writes_tables_plot_and_summary(finished):
    out, _ = finished
    found = json.loads((out / "summary.json").read_text())
    assert list(found) == ["compare", "settings", "upcycle", "prune", "law"]
    for cost in found["compare"].values():
        assert cost["step_ms"] == 3.0 and 6 < cost["bits_per_byte"][0] < 12
    work = [arm["flops"] for arm in found["upcycle"]["arms"].values()]
    assert len(work) == 4 and max(work) < 1.5 * min(work)
    bits = found["prune"]["bits"]
    whole = found["compare"]["experts"]["bits_per_byte"][0]
    for way in ("saliency", "proficiency", "merged", "random"):
        assert len(bits[way]) == 4 and bits[way][0] == pytest.approx(whole, rel=1e-5)
        assert abs(bits[way][-1] - whole) > 1e-6
    assert len(found["law"]["points"]) == 1
    table = (out / "table.md").read_text()
    for words in ("| wide dense |", "upcycled, with optimizer state", "| merged |", "width 16 |"):
        assert words in table
    with Image.open(out / "moe_lm.png") as image:
        assert image.size[0] > 800 and np.asarray(image).std() > 5


def test_costs_are_measured():
    dense = moe_lm.configs(moe_lm.Options(width=8, hidden=4, context=16))["dense"]
    arm = make_arm(dense, 1e-3)
    found = costs({"dense": dense}, {"dense": arm}, jnp.zeros((2, 17), jnp.int32))["dense"]
    assert set(found) == {"step_ms", "tokens_per_second_1", "tokens_per_second_16"}
    assert 0 < found["step_ms"] < 1e4 and min(found.values()) > 0


def test_a_law_in_the_report_is_drawn(finished, tmp_path):
    found = json.loads((finished[0] / "summary.json").read_text())
    law, data, _ = grid()
    found["law"]["points"] = [
        {"width": w, "experts": e, "N": e * w**2, "active": w**2, "D": d, "1-S": 1 / e, "loss": 2.0}
        for w in (16, 32)
        for e in (1, 2)
        for d in (100, 200)
    ]
    found["law"]["fits"] = {"sparsity": law._asdict() | {"foretold": 0.01}}
    assert "60 (N)^-0.35 + 400 (D)^-0.30" in write_report(tmp_path, found)


def test_a_finished_run_is_read_and_other_options_are_refused(finished, capsys):
    out, arguments = finished
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(results) == 3 + 5 + 1
    gone = out / "law/16-2-4/result.json"
    gone.unlink()  # as if stopped after the last checkpoint
    before = json.loads((out / "summary.json").read_text())["law"]
    assert moe_lm.main([*arguments, "--parts", "law"]) == 0
    assert json.loads((out / "summary.json").read_text())["law"] == before
    del results[gone]
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    assert moe_lm.main([*arguments, "--parts", "law", "--learning-rate", "0.1"]) == 2
    assert "another --out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        moe_lm.main([*arguments, "--parts", "laws"])
    assert "'laws'" in capsys.readouterr().err


def test_what_goes_on_begins_where_the_dense_model_ended(finished, text):
    out, _ = finished
    options = moe_lm.Options(
        out=out, seeds=1, width=8, hidden=4, experts=4, chosen=2, copies=2, steps=4, context=16,
        batch=2, limit=4, data=text,
    )  # fmt: skip
    runs = moe_lm.Runs(options, moe_lm.make_console())
    dense, experts = (moe_lm.configs(options)[name] for name in ("dense", "upcycled"))
    base = runs.train("upcycle/base-0", dense, Plan(0, 4, decay=False))
    measured = held_out(runs.text, 16, 4)
    same, fresh, moved = (begin() for begin in moe_lm.starts(runs, base, experts, 0))
    for config, (params, state) in ((dense, same), (experts, fresh), (experts, moved)):
        bits = bits_per_byte(runs.arm(config), params, state, measured)
        assert bits == pytest.approx(base.result["bits_per_byte"], rel=1e-4)
    assert int(fresh[1][1].count) == 0 and int(moved[1][1].count) == 4


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    options = moe_lm.Options(width=8, hidden=4, context=16, data=text)
    dense = moe_lm.configs(options)["dense"]
    runs = moe_lm.Runs(options, moe_lm.make_console())
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train(
            dense, Plan(0, 60), runs.text, tmp_path / "x", runs.console,
            learning_rate=1e30, batch=2, limit=2,
        )  # fmt: skip


def test_a_stopped_run_goes_on_bit_for_bit(text, tmp_path, monkeypatch):
    options = moe_lm.Options(
        out=tmp_path, seeds=1, width=8, hidden=4, experts=4, chosen=2, copies=2, steps=4,
        context=16, batch=2, limit=4, data=text,
    )  # fmt: skip
    runs = moe_lm.Runs(options, moe_lm.make_console())
    config = moe_lm.configs(options)["experts"]
    plan = Plan(0, 4, marks=moe_lm.quarters(4)[1:])

    class Soon(Stop):
        """Asked to stop from the third time on that somebody looks."""

        looks = 0

        @property
        def asked(self):
            self.looks += 1
            return self.looks >= 3

        @asked.setter
        def asked(self, value):
            pass

    whole = runs.train("whole", config, plan).result
    with monkeypatch.context() as patch:
        patch.setattr(moe_training, "Stop", Soon)
        with pytest.raises(Interrupted) as stopped:
            runs.train("stopped", config, plan)
    assert 0 < stopped.value.step < 4 and not (tmp_path / "stopped/result.json").exists()
    assert runs.train("stopped", config, plan).result == whole
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
