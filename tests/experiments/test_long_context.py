"""The long-context experiment: the task, the costs it reports, and a run of a few steps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import long_context as lc
from experiments.long_context_report import rows
from experiments.recall import Recall

TEXT = "we will work and hope that all of this may come to pass for the people of the land. "
TINY = "--arms dense window --seeds 1 --width 16 --stages 64 2 --text-steps 2 --tokens 64 --block 8"


def test_answers_are_the_values_of_the_records_at_the_said_distance():
    task = Recall()
    problem = task.problem(64, 5, seed=0, step=3)
    assert problem.tokens.max() < task.vocab and problem.tokens.min() >= 0
    first_value, first_record = task.noise + task.keys, task.noise + task.keys + task.values
    for tokens, targets, distance in zip(*problem, strict=True):
        asked = np.flatnonzero(targets >= 0)
        assert asked.tolist() == list(range(56, 64))
        records = tokens[asked - distance] - first_record
        np.testing.assert_array_equal(records // task.values, tokens[asked] - task.noise)
        np.testing.assert_array_equal(records % task.values, targets[asked] - first_value)
        assert (tokens >= first_record).sum() == task.pairs == len(set(tokens[asked]))
    again, other = (task.problem(64, 5, seed=0, step=step) for step in (3, 4))
    np.testing.assert_array_equal(problem.tokens, again.tokens)
    assert np.any(problem.tokens != other.tokens)
    with pytest.raises(ValueError, match="pairs=9"):
        dataclasses.replace(task, pairs=9).problem(64, 1, seed=0, step=0)
    with pytest.raises(ValueError, match="tokens=15"):
        task.problem(15, 1, seed=0, step=0)


def test_sparse_kinds_cost_alike_and_at_most_a_quarter_of_dense():
    options = lc.Options()
    share = {}
    for arm in options.arms:
        config = lc.model_config(options, arm, "recall")
        share[arm] = lc.training_flops(config)["attention"]
    dense = share.pop("dense")
    assert max(share.values()) <= 0.25 * dense
    assert max(share.values()) < 1.15 * min(share.values())


@pytest.mark.parametrize("arm", ["window", "nsa"])
def test_a_window_cannot_know_what_is_far_and_nsa_can(arm):
    """Whether the queries at the end depend on the beginning, whatever the weights."""
    options = lc.Options(stages=((512, 1),), tokens=512)
    run = lc.make_arm(options, arm, "recall")
    params = run.init(0)[0]
    model = lc.nnx.merge(run.graph, params)
    x = jnp.asarray(Recall().problem(512, 1, seed=0, step=0).tokens)

    @jax.jit
    def moved(x):
        logits = model(jnp.concatenate([x, x.at[:, 17:32].set(0)]))
        return jnp.abs(logits[0] - logits[1]).max(-1)

    change = moved(x)
    assert change[32:40].max() > 1e-3  # who is near sees it
    far = change[-8:].max()
    assert far < 1e-5 if arm == "window" else far > 1e-5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "context"
    text = out.parent / "text.txt"
    text.write_text(TEXT * 60)
    arguments = [*TINY.split(), "--out", str(out), "--data", str(text)]
    assert lc.main(arguments) == 0
    return out, arguments


def test_a_run_writes_table_plot_and_summary(finished):
    out, _ = finished
    found = json.loads((out / "summary.json").read_text())
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in lines[2:]] == ["| dense", "| window"]
    assert rows(found) == lines
    for arm, cost in found["costs"].items():
        assert cost["step_ms"] > 0 and (cost["density"] == 1.0) == (arm == "dense")
        (recall,), (text,) = found["recall"][arm], found["text"][arm]
        assert 0 <= recall["recall"] <= 1 and len(recall["by_distance"]) == 12
        assert 3 < text["bits_per_byte"] < 10
    assert {"jax", "python", "device", "date", "seeds"} <= set(found["settings"])
    with Image.open(out / "long_context.png") as image:
        image.verify()


def test_a_finished_run_is_read_and_other_options_are_refused(finished, capsys):
    out, arguments = finished
    before = (out / "summary.json").read_text()
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(results) == 4
    (out / "text/window-0/result.json").unlink()  # as if stopped after the last checkpoint
    assert lc.main(arguments) == 0
    now = json.loads((out / "summary.json").read_text())
    assert now["text"] == json.loads(before)["text"]
    del results[out / "text/window-0/result.json"]
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    assert lc.main([*arguments, "--learning-rate", "0.1"]) == 2
    assert "another --out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        lc.main([*arguments, "--arms", "dense", "sparse"])
    assert "'sparse'" in capsys.readouterr().err
