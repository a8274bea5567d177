"""The main job end to end on a small text: what it writes, how it goes on, how it compares."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from experiments.log import read_metrics
from experiments.train_lm import forget, main
from jaxsparse.checkpoint import Checkpointer, restore_masks

ROOT = Path(__file__).parents[2]
STEPS = 30


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    words = "the people of this country and their government ".split()
    parts = (" ".join(words[(i * j) % 8] for j in range(60)) for i in range(60))
    path.write_text("".join(f"# {i} Speech\n\n{part}.\n\n" for i, part in enumerate(parts)))
    return path


def command(text, out, *more):
    options = f"--algorithm rigl --model tiny --context 24 --batch 2 --steps {STEPS} --every 6"
    options += " --log-every 1 --validate-every 10 --checkpoint-every 2 --learning-rate 0.003"
    return [*options.split(), "--data", str(text), "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing disturbs, with the dense model."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main(command(text, out, "--compare")) == 0
    return out


def losses(out):
    return [(record["step"], record["loss"]) for record in read_metrics(out / "metrics.jsonl")]


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "experiments.train_lm", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def wait_for(process, done):
    end = time.monotonic() + 900
    while not done():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"the run ended too early or hangs:\n{process.communicate()[0]}")
        time.sleep(0.01)


def steps_done(out):
    return len(read_metrics(out / "metrics.jsonl"))


def test_every_artefact_is_written(whole):
    names = {path.name for path in whole.iterdir()}
    files = {"metrics.jsonl", "result.json", "summary.json", "sample.txt", "table.txt"}
    assert names == files | {"loss.png", "masks.png", "checkpoints", "dense"}
    for name in ("loss.png", "masks.png"):
        with Image.open(whole / name) as image:
            image.verify()
    assert "|" in (whole / "sample.txt").read_text()


def test_metrics_have_every_step_once_and_the_masks(whole):
    records = read_metrics(whole / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"] - 1
    watched = [record for record in records if "churn" in record]
    assert [record["step"] for record in watched] == [1, 7, 13, 19, 25]
    for record in watched:
        kept = [1 - x for layers in record["sparsity"].values() for x in layers]
        assert len(record["sparsity"]) == 7 and 0 < min(kept) and max(kept) < 0.5
    moved = [sum(sum(layers) for layers in record["churn"].values()) for record in watched]
    assert moved[0] == 0 and moved[1] > 0 and moved[4] == 0  # from step 22 on masks rest
    checked = [record["step"] for record in records if "valid_bits_per_byte" in record]
    assert checked == [1, 10, 20, 30]


def test_the_table_has_both_arms_filled(whole):
    shown = (whole / "table.txt").read_text()
    for words in (
        "rigl",
        "dense",
        "validation, bits per byte",
        "on paper",
        "unigram",
        "gzip",
        "xz",
    ):
        assert words in shown
    assert "--compare" not in shown
    sparse, dense = (json.loads((whole / d / "result.json").read_text()) for d in ("", "dense"))
    assert f"{sparse['valid_bits_per_byte']:.3f}" in shown
    assert f"{dense['valid_bits_per_byte']:.3f}" in shown
    assert len(losses(whole / "dense")) == STEPS


def test_the_last_checkpoint_is_sparse(whole):
    masks = restore_masks(whole / "checkpoints")
    kernels = {path: mask for path, mask in masks.items() if mask.ndim}
    assert len(kernels) == 7
    kept, size = (
        sum(f(m) for m in kernels.values()) for f in (lambda m: m.sum(), lambda m: m.size)
    )
    assert kept / size == pytest.approx(0.1, abs=0.001)
    with Checkpointer(whole / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == STEPS


def test_a_finished_run_prints_its_table_and_trains_nothing(whole, text, capsys):
    before = (whole / "metrics.jsonl").read_bytes(), (whole / "table.txt").read_text()
    assert main(command(text, whole)) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown and "--fresh" in shown and "with --compare" not in shown
    assert "step 1/" not in shown
    assert before == ((whole / "metrics.jsonl").read_bytes(), (whole / "table.txt").read_text())


def test_another_config_is_refused_and_nothing_is_lost(whole, text, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert main(command(text, whole, "--weight-decay", "0.2")) == 2
    shown = capsys.readouterr().out
    assert "weight_decay" in shown and "--fresh" in shown
    assert before == (whole / "metrics.jsonl").read_bytes()


def test_a_bad_text_stops_before_any_work(tmp_path, capsys):
    assert main(command(tmp_path / "none.txt", tmp_path / "out")) == 2
    assert "none.txt does not exist" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_killed_and_interrupted_runs_go_on_bit_for_bit(whole, text, tmp_path):
    out = tmp_path / "killed"
    out.mkdir()  # with what a run leaves that was killed before its first checkpoint
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n{"step": 2, "lo')
    process = start(command(text, out))
    wait_for(process, lambda: steps_done(out) >= 5)
    process.kill()
    process.communicate()
    killed = steps_done(out)

    process = start(command(text, out))
    wait_for(process, lambda: steps_done(out) >= killed + 6)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=900)[0]
    assert process.returncode == 130
    assert "going on after step" in shown and "The same command goes on" in shown
    assert "Traceback" not in shown
    stopped = steps_done(out)
    assert f"Stopped after step {stopped} of {STEPS}" in shown
    with Checkpointer(out / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == stopped

    assert main(command(text, out)) == 0
    assert losses(out) == losses(whole)
    sparse, other = (json.loads((d / "result.json").read_text()) for d in (whole, out))
    assert sparse["valid_bits_per_byte"] == other["valid_bits_per_byte"]


def test_stored_blocks_train_and_go_on_from_a_checkpoint(text, tmp_path):
    out = tmp_path / "blocks"
    options = "--algorithm block_rigl --block 16 16"
    assert main(command(text, out, *options.split())) == 0
    first = losses(out)
    assert len(first) == STEPS and first[-1][1] < first[0][1] - 1
    assert "Only stored blocks are multiplied" in (out / "table.txt").read_text()
    moved = [record["churn"] for record in read_metrics(out / "metrics.jsonl") if "churn" in record]
    assert len(moved) == 5 and any(max(layers) > 0 for layers in moved[1].values())

    newest = max((out / "checkpoints").iterdir())  # as if the run had been killed before it
    shutil.rmtree(newest)
    (out / "result.json").unlink()
    assert main(command(text, out, *options.split())) == 0
    assert losses(out) == first


def test_fresh_deletes_the_run_and_nothing_else(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    (out / "notes.txt").write_text("mine")
    forget(out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
