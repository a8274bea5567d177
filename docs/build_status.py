"""Writes docs/status.md from the code: `python docs/build_status.py` (`--check` only compares).

What a row says comes from the docstring (first line, References), from the tests that name the
thing, and from the tables in experiments/results/ that have it.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxsparse
import jaxsparse.attention
import jaxsparse.checkpoint
import jaxsparse.moe
import jaxsparse.nn
import pallas_kernels

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/status.md"
RAN_ON: dict[str, str] = {}
"""Name -> devices beside CPU on which its tests have passed, e.g. {"sparsify": "H100, TPU v5e"}."""

OWN_NAMES = ("attention", "moe")  # rooms whose names are used with that of the room
ABOUT_PAGES = ("test_status", "test_docs", "test_architecture")  # they test no method

HEAD = """\
# Status

One row for every method, pattern and kernel. This page is made from the code by
`python docs/build_status.py`; do not edit it.

*Tests*: the test files that name the thing, beside its doctest; *conformance* is the suite that
holds all things of a kind to one contract. *Devices*: where those tests have passed; CPU stands for
8 host devices on a CPU. *Measured*: the tables in `experiments/results/` that have it; a dash means
that nobody has measured it yet.
"""

SECTIONS = (
    "Training algorithms",
    "One-shot methods",
    "Scores",
    "Patterns",
    "Distributions",
    "Schedules",
    "Weight formats",
    "Attention",
    "Mixture of experts",
    "Layers",
    "Tools",
    "Kernels",
)


def section_of(thing: Any) -> str:
    """Under which heading a public thing stands."""
    module, returns = thing.__module__, str(getattr(thing, "__annotations__", {}).get("return"))
    if "MaskUpdater" in returns:
        return "Training algorithms"
    if module == "jaxsparse.patterns" and hasattr(thing, "gather"):
        return "Patterns"
    if "Distribution" in returns:
        return "Distributions"
    rooms = {
        "oneshot": "One-shot methods",
        "scores": "Scores",
        "schedules": "Schedules",
        "formats": "Weight formats",
        "attention": "Attention",
        "moe": "Mixture of experts",
        "nn": "Layers",
    }
    if module.startswith("pallas_kernels"):
        return "Kernels"
    return rooms.get(module.split(".")[1], "Tools")


def public() -> Iterator[tuple[str, Any]]:
    """(name as a user writes it, thing) for every function and class that is exported."""
    rooms = (jaxsparse.attention, jaxsparse.moe, jaxsparse.nn, jaxsparse.checkpoint)
    for module in (jaxsparse, *rooms, pallas_kernels):
        prefix = module.__name__.removeprefix("jaxsparse").lstrip(".")
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if module in rooms and not str(thing.__module__).startswith(module.__name__):
                continue  # from another room, which has its row
            if inspect.isfunction(thing) or inspect.isclass(thing) or hasattr(thing, "__wrapped__"):
                if not getattr(thing, "_is_protocol", False):
                    yield (f"{prefix}.{name}" if prefix else name), thing


def names_in_tests() -> dict[str, set[str]]:
    """Test file -> public names that it uses: `jsp.rigl`, or `rigl` imported from jaxsparse.

    Those of `OWN_NAMES` also as `attention.fixed`, since `jsp.fixed` is another thing.
    """
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        if file.stem in ABOUT_PAGES:
            continue
        tree = ast.parse(file.read_text())
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("jsp", "jaxsparse")
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("jaxsparse", "pallas_kernels")
            ):
                used |= {alias.name for alias in node.names}
                room = str(node.module).removeprefix("jaxsparse.").split(".")[0]
                if room in OWN_NAMES:
                    used |= {f"{room}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.Attribute):
                *_, room, name = ["", *ast.unparse(node).split(".")]
                if room in OWN_NAMES:
                    used.add(f"{room}.{name}")
        path = file.relative_to(ROOT / "tests")
        label = path.parts[0] if path.parts[0] == "conformance" else path.stem
        found.setdefault(label.removeprefix("test_"), set()).update(used)
    return found


def tables_with(name: str) -> list[str]:
    """Stems of the result tables that have a name as a word; `set_` also as `set`."""
    word = re.compile(rf"(?<![\w.]){re.escape(name.rstrip('_'))}_?(?![\w.])")
    files = sorted(
        p for p in (ROOT / "experiments/results").glob("*") if p.suffix in (".md", ".json")
    )
    return sorted({p.stem for p in files if word.search(p.read_text())})


def row(name: str, thing: Any, tests: dict[str, set[str]]) -> str:
    """One line of the table."""
    doc = inspect.getdoc(thing) or ""
    what = doc.split("\n", 1)[0].replace("|", r"\|").rstrip(".")
    part = re.search(r"^References: (.*?)(?:\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    paper = " ".join(part[1].split()).rstrip(".") if part else ""
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    key = name if name.split(".")[0] in OWN_NAMES else name.rsplit(".", 1)[-1]
    tested = ", ".join(label for label, used in tests.items() if key in used)
    devices = ", ".join(filter(None, ["CPU", RAN_ON.get(name)])) if tested else "-"
    measured = ", ".join(tables_with(name))
    cells = [f"`{name}`", what, paper or "-", tested or "doctest only", devices, measured or "-"]
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page."""
    tests, parts = names_in_tests(), [HEAD]
    rows: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for name, thing in public():
        rows[section_of(thing)].append(row(name, thing, tests))
    for section, lines in rows.items():
        parts.append(f"## {section}\n")
        if lines:
            parts.append("| Name | What | Paper | Tests | Devices | Measured |")
            parts.append("|---|---|---|---|---|---|")
            parts += sorted(lines, key=str.lower) + [""]
        else:
            parts.append("None yet.\n")
    return "\n".join(parts).rstrip() + "\n"


def main() -> int:
    """Write the page, or with --check say whether it is up to date."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print("docs/status.md is not what the code says: run python docs/build_status.py")
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
