"""The steps of the grouped TPU kernels, as the compiler schedules them, and the model on it.

`python -m experiments.model_grouped --budgets tests/pallas_kernels/grouped_budgets.json` accepts
them anew.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import model_grouped
from experiments.model_grouped import KERNELS, Bundles, cycles, read
from experiments.tpu_model import CHIPS, Chip
from pallas_kernels._grouped_tpu import Config, visits
from tests.pallas_kernels.test_tpu_budgets import jump, written
from tests.pallas_kernels.tpu import needs_libtpu

BUDGETS = json.loads(Path(__file__).with_name("grouped_budgets.json").read_text())
RESULTS = Path(model_grouped.__file__).parent / "results" / "model_grouped.json"
SLACK = 0.05


def beyond(found, kept):
    """What differs by more than 5 %, in words."""
    assert [(row["chip"], row["kernel"]) for row in found] == [
        (row["chip"], row["kernel"]) for row in kept
    ]
    return [
        f"{old['chip']} {old['kernel']}: {field} was {old[field]}, is {new[field]} bundles"
        for new, old in zip(found, kept, strict=True)
        for field in ("whole", "half", "extra")
        if abs(new[field] - old[field]) > SLACK * max(old[field], 1)
    ]


@needs_libtpu
def test_schedules_keep_their_length(tmp_path):
    version = importlib.metadata.version("libtpu")
    if version != BUDGETS["libtpu"]:
        pytest.skip(f"budgets are of libtpu {BUDGETS['libtpu']}, this is {version}")
    out = tmp_path / "budgets.json"  # libtpu reads where to write schedules once a process
    command = [sys.executable, "-m", "experiments.model_grouped", "--budgets", str(out)]
    subprocess.run(command, check=True, cwd=Path(model_grouped.__file__).parents[1], env=os.environ)
    bad = beyond(json.loads(out.read_text())["budgets"], BUDGETS["budgets"])
    assert not bad, "\n".join(
        ["", *bad, "if it is meant, write them anew: see the head of this file"]
    )


def test_a_longer_step_is_named():
    kept = BUDGETS["budgets"]
    assert not beyond(kept, kept)
    changed = [*kept[:-1], kept[-1] | {"whole": round(kept[-1]["whole"] * 1.1)}]
    (bad,) = beyond(changed, kept)
    assert bad.startswith(f"{kept[-1]['chip']} {kept[-1]['kernel']}: whole was")


def test_arms_of_a_step_are_read():
    nop, product, store = ("nop", ""), ("vmatmul", ""), ("vst", "")
    program = [
        ("nop", "Start region 1"),  # the grid, 24 bundles
        jump(2), nop, store, store,  # clears a tile
        ("nop", "Start/End empty region 2"),
        jump(3), nop, product, nop,  # half a tile
        ("nop", "Start/End empty region 3"),
        jump(4), nop, product, ("vmatmul", "Start region 41"), product, jump(41), nop, product,
        ("nop", "Start/End empty region 4"),
        nop, nop,
        jump(1), nop,
    ]  # fmt: skip
    # Beside the arms, of 2 and 6 bundles, and the 2 that clear: 24 - 10. A loop of 4 once more.
    assert len(program) == 24
    assert read(*written(program), delay=1, turns=2) == Bundles(14 + 6, 14 + 2, 2, 0)
    assert read(*written(program), delay=1, turns=3) == Bundles(14 + 6 + 4, 14 + 2, 2, 0)


def test_the_model_by_hand(monkeypatch):
    slow = Chip("", clock=1e9, flops=1e30, bandwidth=1e30, block=128)
    monkeypatch.setitem(CHIPS, "slow", slow)
    config, found = Config(64, 7168, 4096), Bundles(1000, 600, 10, 0)
    sizes = jnp.array([80, 48, 0])  # a whole tile, half of the next, the other part of it
    lists = visits(sizes, 128, 64)
    total, bound = cycles("slow", KERNELS["forward"], config, found, lists, 3)
    assert bound == "step"
    assert total == pytest.approx(2 * (1000 + (600 + 10) + (1000 + 10)))
    lists = visits(sizes, 128, 64, empty=True)
    total, _ = cycles("slow", KERNELS["dw"], config, Bundles(1000, 1000, 10, 0), lists, 3)
    assert total == pytest.approx(2 * (4 * 1000 + 3 * 10))
    monkeypatch.setitem(CHIPS, "slow", Chip("", 1e9, 1e30, bandwidth=1, block=128))
    assert cycles("slow", KERNELS["forward"], config, found, visits(sizes, 128, 64), 3)[1] == "HBM"


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_modelled_rates_reach_the_dense_rate(chip):
    rows = [row for row in json.loads(RESULTS.read_text())["modelled"] if row["chip"] == chip]
    rows = [row for row in rows if row["mean rows"] >= 256]
    assert {row["kernel"] for row in rows} == set(KERNELS) and len(rows) == 24
    for row in rows:
        assert row["rate over dense"] >= 0.85, row
