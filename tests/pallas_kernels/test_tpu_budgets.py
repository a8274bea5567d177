"""The length of the TPU kernels' steady loops, as the compiler schedules them, and the model on it.

`python -m experiments.tpu_model --budgets tests/pallas_kernels/tpu_budgets.json` accepts them anew.
"""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import tpu_model, tpu_schedule
from experiments.tpu_schedule import Schedule, dump_folder, read
from pallas_kernels._block_sparse_tpu import Config
from tests.pallas_kernels.tpu import needs_libtpu

BUDGETS = json.loads(Path(__file__).with_name("tpu_budgets.json").read_text())
RESULTS = Path(tpu_model.__file__).parent / "results" / "tpu_model.json"
SLACK = 0.05
MEND = "if it is meant, write the budgets anew: see the head of this file"


def beyond(found, kept):
    """What differs by more than 5 %, in words."""
    name = lambda row: (row["chip"], row["kernel"], row["block"], row["live"])  # noqa: E731
    found, kept = ({name(row): row for row in rows} for rows in (found, kept))
    if found.keys() != kept.keys():
        return [f"kernels without a budget or gone: {found.keys() ^ kept.keys()}"]
    return [
        f"{row['chip']} {row['kernel']}: {field} was {row[field]}, is {found[key][field]} bundles"
        for key, row in kept.items()
        for field in ("step", "end", "turn")
        if abs(found[key][field] - row[field]) > SLACK * max(row[field], 1)
    ]


@needs_libtpu
def test_schedules_keep_their_length(tmp_path):
    version = importlib.metadata.version("libtpu")
    if version != BUDGETS["libtpu"]:
        pytest.skip(f"budgets are of libtpu {BUDGETS['libtpu']}, this is {version}")
    # libtpu reads where to write schedules once a process.
    out = tmp_path / "budgets.json"
    command = [sys.executable, "-m", "experiments.tpu_model", "--budgets", str(out)]
    subprocess.run(command, check=True, cwd=Path(tpu_model.__file__).parents[1], env=os.environ)
    bad = beyond(json.loads(out.read_text())["budgets"], BUDGETS["budgets"])
    assert not bad, "\n".join(["", *bad, MEND])


def test_a_longer_or_shorter_schedule_is_named():
    kept = BUDGETS["budgets"]
    assert not beyond(kept, kept)
    for factor in (0.9, 1.1):
        changed = [*kept[:-1], kept[-1] | {"step": round(kept[-1]["step"] * factor)}]
        (bad,) = beyond(changed, kept)
        assert bad.startswith(f"{kept[-1]['chip']} {kept[-1]['kernel']}: step was")
    assert "without a budget or gone" in beyond(kept[1:], kept)[0]


UNITS = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"


def written(program):
    """As libtpu writes it: (what it is, comment) a bundle -> bundles, use of units."""
    lines, rows = [], [UNITS, "2 2 2 4 2 1 3 3 2 2 2", "== UTILIZATION:"]
    for at, (what, comment) in enumerate(program):
        lines.append(f" 0x{at:x}   : > {{ %1 = {what} }} /* {comment} */")
        units = [name.split(":")[-1].strip() for name in UNITS.split(",")]
        used = {"vmatmul": "MATMUL", "vxpose": "XLU", "vst": "VSTORE", "vst.spill": "SPILL"}
        rows.append(" ".join(str(int(used.get(what) == unit)) for unit in units))
    return "\n".join(lines), "\n".join(["== CAPACITY:", *rows])


def jump(region):
    return f"sbr.rel (%p1) target = $region{region}", ""


def test_the_usual_step_is_followed():
    nop, copy, product = ("nop", ""), ("dma.hbm_to_vmem [thread:$0]", ""), ("vmatmul", "")

    def arm(region, body):
        return [(body[0][0], f"Start region {region}"), *body[1:], jump(region), nop]

    program = [
        nop,
        ("nop", "Start region 1"),  # the grid, 48 bundles
        jump(2), nop, copy, *arm(21, [copy]),  # fills the pipeline: skipped
        ("nop", "Start/End empty region 2"),
        jump(3), nop, copy, copy, *arm(31, [copy]),  # the next group: 2 of it and the jump over 31
        ("nop", "Start/End empty region 3"),
        jump(4), nop, product, product, product,  # a full group
        ("nop", "Start/End empty region 4"),
        jump(5), nop, *arm(51, [product, nop]),  # one that is not full: skipped
        ("nop", "Start/End empty region 5"),
        jump(6), nop, ("vst", ""), ("vst.spill", ""), ("vst", ""),  # the end of an output block
        ("nop", "Start/End empty region 6"),
        jump(7), nop, *arm(71, [("vxpose", ""), nop, nop]),  # a loop of transposes
        ("nop", "Start/End empty region 7"),
        jump(1), nop,
    ]  # fmt: skip
    found = read(*written(program), delay=1)
    # 6 jumps over something and one back, with their delay, what they land on, and the start.
    assert found == Schedule(step=14 + 6 + 1 + 2 + 3 + 3, end=3, turn=5, spills=1)


def test_the_model_by_hand():
    chip = tpu_model.Chip("", clock=1e9, flops=2e12, bandwidth=1e12, block=128)
    problem = tpu_model.Problem((1024, 512, 512), 128, live=2)
    found = Schedule(step=50_000, end=100, turn=10, spills=0)
    forward, dw = tpu_model.KERNELS["forward"], tpu_model.KERNELS["dw"]
    got = tpu_model.predict(problem, forward, Config(512, 2), found, chip)
    # 2 panels of 4 steps and 4 ends; the first panel of x and the last block of y are not hidden.
    cycles = 2 * (4 * 50_000 + 4 * 100) + 512 * (512 + 128) * 2 / 1000
    assert got.us == pytest.approx(cycles / 1000) and got.bound == "bundles"
    assert got.peak == pytest.approx(2 * 1024 * 128 * 128 * 8 / 2e12 / (cycles / 1e9))
    short = dataclasses.replace(found, step=1)
    got = tpu_model.predict(problem, forward, Config(512, 2), short, chip)
    assert got.bound == "MXU"  # 2 * 512 * 128 * 256 FLOPs at 2000 a cycle
    assert got.us == pytest.approx((2 * (4 * 16777.216 + 400) + 655.36) / 1000)
    slow = dataclasses.replace(chip, bandwidth=1e9)
    assert tpu_model.predict(problem, forward, Config(512, 2), short, slow).bound == "HBM"
    got = tpu_model.predict(problem, dw, Config(256, 2, strip=2), found, chip)
    # 2 strips of 2 steps over 4 tiles, each of which is turned in 4 parts.
    cycles = 2 * (4 * (2 * 50_000 + 4 * 10) + 2 * 100) + 256 * 512 * 2 / 1000
    assert got.us == pytest.approx(cycles / 1000)
    with pytest.raises(ValueError, match="groups of 3 that are not full"):
        tpu_model.predict(problem, forward, Config(512, 3), found, chip)


GOALS = {"v5e": (1.8, 4.5, 9, 17), "v6e": (1.8, 4, 7, 11)}


@pytest.mark.parametrize("chip", GOALS)
def test_modelled_forward_reaches_its_goals(chip):
    rows = json.loads(RESULTS.read_text())["modelled"]
    rows = [row for row in rows if row["chip"] == chip and row["kernel"] == "forward"]
    assert [round(row["sparsity"], 2) for row in rows] == [0.5, 0.8, 0.9, 0.95]
    for row, goal in zip(rows, GOALS[chip], strict=True):
        assert row["speedup"] >= goal


def test_schedules_are_asked_for_before_libtpu_is_used(monkeypatch):
    used = SimpleNamespace(cache_info=lambda: SimpleNamespace(currsize=1))
    monkeypatch.setattr(tpu_schedule, "devices_of", used)
    with pytest.raises(RuntimeError, match="call dump_folder before anything is compiled"):
        dump_folder.__wrapped__()
