"""docs/status.md is what docs/build_status.py makes of the code."""

import inspect
import operator

import pytest

import jaxsparse as jsp
from docs import build_status


def test_the_page_is_up_to_date():
    same = build_status.PAGE.read_text() == build_status.page()
    assert same, "docs/status.md is not what the code says: run python docs/build_status.py"


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("rigl", "Training algorithms"),
        ("prune", "One-shot methods"),
        ("snip", "Scores"),
        ("NM", "Patterns"),
        ("lamp", "Distributions"),
        ("every", "Schedules"),
        ("attention.s2", "Attention"),
        ("sparsify", "Tools"),
    ],
)
def test_each_kind_has_its_section(name, section):
    assert build_status.section_of(operator.attrgetter(name)(jsp)) == section


def test_every_public_name_has_a_row():
    rows = {name for name, _ in build_status.public()}
    for name in jsp.__all__:
        thing = getattr(jsp, name)
        if not inspect.ismodule(thing) and not getattr(thing, "_is_protocol", False):
            assert name in rows


def test_a_row_says_what_paper_tests_and_devices():
    tests = {"conformance": {"rigl"}, "other": set()}
    cells = build_status.row("rigl", jsp.rigl, tests).split(" | ")
    assert cells[0] == "| `rigl`" and cells[1].startswith("Dynamic sparse training")
    assert "https://arxiv.org/abs/1911.11134" in cells[2] and cells[3:5] == ["conformance", "CPU"]
    assert build_status.row("rigl", jsp.rigl, {}).split(" | ")[3:5] == ["doctest only", "-"]
