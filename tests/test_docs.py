"""README, CONTRIBUTING and docs run as printed, their links resolve, and the notebooks execute.

A ```python block is run, all blocks of a file in one fresh process and namespace. A sketch that
cannot run is marked on the line above: `<!-- not run: the reason -->` (never in the README).
"""

import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NOTEBOOKS = sorted(ROOT.glob("experiments/notebooks/*.ipynb"))
FENCE = re.compile(r"^(<!-- not run: .+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


def name(path):
    return str(path.relative_to(ROOT))


def code_of(text):
    """The code blocks of a page, each on its own lines: a traceback names the line of the page."""
    lines = [""] * text.count("\n")
    for block in FENCE.finditer(text):
        if not block[1]:
            first = text.count("\n", 0, block.start(2))
            for i, line in enumerate(block[2].splitlines()):
                lines[first + i] = line
    return "\n".join(lines)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _as_a_user_runs_it(monkeypatch):
    """One device, not the 8 of the tests; this checkout, installed or not."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=name)
def test_code_blocks_run_as_printed(page, tmp_path):
    text = page.read_text()
    if page.name == "README.md":
        assert "<!-- not run" not in text, "every block of the README runs"
    run = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'))"
    command = [sys.executable, "-W", "error", "-c", run, name(page)]
    done = subprocess.run(
        command, input=code_of(text), text=True, capture_output=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, f"{name(page)} does not run as printed:\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    targets = LINK.findall(without_code(page.read_text()))
    dead = [target for target in targets if not (page.parent / target).exists()]
    assert not dead, f"{name(page)} links to {dead}, which do not exist (paths are relative to it)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_runs_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()


def test_a_failing_block_would_be_seen():
    page = "# x\n\n```python\na = 1\n```\n\n<!-- not run: a sketch -->\n```python\nb\n```\ntext\n"
    assert code_of(page).splitlines()[3] == "a = 1"
    assert "b" not in code_of(page)
    assert LINK.findall("[a](docs/a.md#part) [b](https://x.y) [c](#here)") == ["docs/a.md"]
