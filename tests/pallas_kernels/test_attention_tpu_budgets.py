"""The length of the loops of the TPU kernels of block-sparse attention, and the model on it.

`python -m experiments.tpu_model_attention --chips v5e v6e --budgets FILE`, the FILE being
`tests/pallas_kernels/attention_tpu_budgets.json`, accepts them anew.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import tpu_model_attention as model
from experiments.tpu_model import Chip
from experiments.tpu_schedule import Walk
from pallas_kernels._attention_tpu import Plan
from tests.pallas_kernels.tpu import needs_libtpu

BUDGETS = json.loads(Path(__file__).with_name("attention_tpu_budgets.json").read_text())
RESULTS = Path(model.__file__).parent / "results" / "tpu_model_attention.json"
SLACK = 0.05


def beyond(found, kept):
    """What differs by more than 5 %, in words."""
    name = lambda row: (row["chip"], row["kernel"], row["members"])  # noqa: E731
    found, kept = ({name(row): row for row in rows} for rows in (found, kept))
    if found.keys() != kept.keys():
        return [f"kernels without a budget or gone: {found.keys() ^ kept.keys()}"]
    return [
        f"{row['chip']} {row['kernel']}: {field} was {row[field]}, is {found[key][field]} bundles"
        for key, row in kept.items()
        for field in ("full", "masked", "list")
        if abs(found[key][field] - row[field]) > SLACK * row[field]
    ]


@needs_libtpu
def test_loops_keep_their_length(tmp_path):
    version = importlib.metadata.version("libtpu")
    if version != BUDGETS["libtpu"]:
        pytest.skip(f"budgets are of libtpu {BUDGETS['libtpu']}, this is {version}")
    # libtpu reads where to write schedules once a process.
    out = tmp_path / "budgets.json"
    chips = sorted({row["chip"] for row in BUDGETS["budgets"]})
    command = [sys.executable, "-m", "experiments.tpu_model_attention", "--chips", *chips]
    subprocess.run(
        [*command, "--budgets", str(out)],
        check=True,
        cwd=Path(model.__file__).parents[1],
        env=os.environ,
    )
    bad = beyond(json.loads(out.read_text())["budgets"], BUDGETS["budgets"])
    assert not bad, "\n".join(["", *bad, "if it is meant, see the head of this file"])


def test_a_longer_or_shorter_loop_is_named():
    kept = BUDGETS["budgets"]
    assert not beyond(kept, kept)
    for factor in (0.9, 1.1):
        changed = [*kept[:-1], kept[-1] | {"full": round(kept[-1]["full"] * factor)}]
        (bad,) = beyond(changed, kept)
        assert bad.startswith(f"{kept[-1]['chip']} {kept[-1]['kernel']}: full was")
    assert "without a budget or gone" in beyond(kept[1:], kept)[0]


def test_loops_are_told_apart():
    """A grid loop of 40 bundles with two loops that multiply, and one that does not."""
    product = [9 <= i < 15 or 22 <= i < 26 for i in range(50)]
    jumps = {14: 8, 25: 20, 33: 31, 41: 3}
    nothing = [False] * 50
    way = Walk(1, jumps, product, nothing, nothing, nothing, 0)
    assert model.loops(way) == (8, 7, 40 - 8 - 7)


def test_the_model_by_hand():
    chip = Chip("", clock=1e9, flops=2e13, bandwidth=1e12, block=128)
    plan = Plan(own=128, listed=128, lists=2, units=6, heads=2, members=4, units_per_head=2)
    found = model.Bundles(full=20_000, masked={2: 9_000, 4: 21_000}, list_=500)
    counts = np.array([5, 7])
    # 5 entries, one partial: a full tile and a last one of 2; 7: a full one and one of 4.
    want = 6 * (2 * 500 + 2 * 20_000 + 9_000 + 21_000)
    assert model.cycles(plan, found, counts, "forward", chip) == pytest.approx(want)
    slow = Chip("", clock=1e9, flops=2e13, bandwidth=1e9, block=128)
    tile = 2 * 4 * 128 * 128 * 2  # bytes of keys and values, at a byte a cycle
    want = 6 * (2 * 500 + 2 * tile + tile / 2 + tile)
    assert model.cycles(plan, found, counts, "forward", slow) == pytest.approx(want)


def test_kept_blocks_are_as_many_as_asked_for():
    problem = model.Problem(1, 128, tokens=4096)
    found = model.kept(problem, 0.25)
    assert not np.triu(found, 1).any() and found.diagonal().all()
    np.testing.assert_array_equal(found.sum(1)[3:], np.round(0.25 * np.arange(4, 33)))


def test_modelled_forward_reaches_its_goals():
    """Where lists are long a pair costs as in a dense tile: 1.1 on v5e, 1.25 on v6e."""
    rows = json.loads(RESULTS.read_text())["modelled"]
    for chip, goal in (("v5e", 1.1), ("v6e", 1.25)):
        found = [r for r in rows if r["chip"] == chip and r["kernel"] == "forward"]
        assert len(found) == 8 and all(row["tile"] <= goal for row in found)
        assert min(row["call"] for row in found if row["heads"] == 4) <= goal
