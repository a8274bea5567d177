"""The shape of the code: who imports whom, file sizes, and that every public name is documented.

Each check takes `{path: source}` and returns complaints `path:line: rule`; the tests run it on the
tree and on a small tree that breaks the rule.
"""

import ast
import inspect
import sys
import types
from pathlib import Path

import pytest

import jaxsparse

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxsparse", "pallas_kernels", "models", "experiments")
MAX_LINES = 400

# Who may import whom: a room sees the rooms it names, and the rooms those see. Rooms that are not
# on a path never meet. A room is a file or folder of jaxsparse/, or another package.
SEES = {
    "experiments": "models training oneshot _report checkpoint testing jaxsparse",
    "models": "nn",
    "nn": "formats structured attention moe activations dictionary plans",
    "training": "_choose stats formats",
    "oneshot": "_choose stats formats",
    "_choose": "plans scores",
    "plans": "_masks",
    "scores": "_masks",
    "stats": "_masks",
    "_masks": "patterns select schedules",
    "formats": "patterns pallas_kernels",
    "structured": "patterns pallas_kernels",
    "attention": "pallas_kernels select",
    "moe": "pallas_kernels",
    "patterns": "select",  # make_mask joins the two
    **dict.fromkeys("select schedules activations dictionary pallas_kernels _tree".split(), ""),
}
ANY_ROOM = ("_report", "checkpoint", "testing", "jaxsparse")  # the last: jaxsparse/__init__.py
PART_OF = {
    "_regular": "select",
    "allocators": "plans",
    "_report_table": "_report",
}  # one room in two files
LEAF = "_tree"  # every room of jaxsparse may import it
THIRD_PARTY = {"jaxsparse": {"jax", "numpy", "optax"}, "pallas_kernels": {"jax"}}
THIRD_PARTY_OF_ROOM = {
    "nn": {"flax"},
    "checkpoint": {"orbax", "etils"},  # etils: orbax's paths
    "attention": {"matplotlib"},  # imported when it plots
}


def read_tree():
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in sorted(files)}


def room_of(path):
    """`jaxsparse/scores/_snip.py` -> `scores`; `models/vit.py` -> `models`."""
    package, *rest = path.removesuffix(".py").split("/")
    if package != "jaxsparse":
        return package
    if rest in ([], ["__init__"]):
        return "jaxsparse"
    room = "/".join(rest) if "/".join(rest) in SEES else rest[0]
    return PART_OF.get(room, room)


def visible_from(room):
    if room in ANY_ROOM:
        return (set(SEES) | set(ANY_ROOM)) - {"experiments", "models"}
    seen, queue = {room}, [room]
    while queue:
        for other in SEES.get(queue.pop(), "").split():
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return visible_from("jaxsparse") | seen if room == "experiments" else seen


def imports_of(path, source, files):
    """Each import as (line, imported file or None, dotted name); relative ones made absolute."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield node.lineno, resolve(name, files, isinstance(node, ast.Import)), name


def resolve(name, files, whole):
    """The file that an imported dotted name comes from; a `from` import may name a thing in it."""
    parts = name.split(".")
    for stem in ("/".join(parts), "" if whole else "/".join(parts[:-1])):
        for file in (f"{stem}.py", f"{stem}/__init__.py"):
            if file in files:
                return file
    return None


def rebound_names(files):
    """Exports that hide a file: `jsp.report`, the function, hides `jaxsparse/report.py`."""
    init = "jaxsparse/__init__.py"
    from_ = [n for n in ast.walk(ast.parse(files[init])) if isinstance(n, ast.ImportFrom)]
    names = {a.asname or a.name for n in from_ if n.module != "jaxsparse" for a in n.names}
    return {f"jaxsparse.{name}" for name in names if f"jaxsparse/{name}.py" in files}


def check_imports(files):
    bad, rebound = [], rebound_names(files)
    for path, source in files.items():
        room, package = room_of(path), path.split("/")[0]
        if package == "jaxsparse" and room not in {*SEES, *ANY_ROOM}:
            bad.append(f"{path}:1: unknown room `{room}`: say in SEES whom it may import")
            continue
        known = THIRD_PARTY.get(package, set()) | THIRD_PARTY_OF_ROOM.get(room, set())
        for line, target, name in imports_of(path, source, files):
            top = name.split(".")[0]
            if top not in PACKAGES:
                free = top in sys.stdlib_module_names or package in ("models", "experiments")
                if not free and top not in known:
                    bad.append(
                        f"{path}:{line}: `{room}` may not import {top}, only {sorted(known)}"
                    )
                continue
            if target is None:
                bad.append(f"{path}:{line}: there is no file for {name}")
                continue
            other = room_of(target)
            if other not in visible_from(room) and not (package == "jaxsparse" and other == LEAF):
                bad.append(f"{path}:{line}: room `{room}` may not import room `{other}` ({name})")
            inside = top == package and not path.endswith("__init__.py")
            if inside and name in rebound:
                bad.append(
                    f"{path}:{line}: an export hides the file {name}: name what you need in it"
                )
            if inside and target.endswith("__init__.py"):
                bad.append(f"{path}:{line}: import the file that defines {name}, not {target}")
    return bad


def check_lengths(files):
    lengths = {path: source.count("\n") for path, source in files.items()}
    return [
        f"{path}:{length}: a file has at most {MAX_LINES} lines; split it in two rooms or files"
        for path, length in lengths.items()
        if length > MAX_LINES
    ]


def check_no_logic(files, path="jaxsparse/__init__.py"):
    """Only a docstring, imports, `__all__` and `__version__`."""
    bad = []
    for node in ast.parse(files[path]).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
            "__all__",
            "__version__",
        )
        if not (docstring or named or isinstance(node, ast.Import | ast.ImportFrom)):
            bad.append(f"{path}:{node.lineno}: it exports names and holds no logic")
    return bad


def is_updater(thing, stored=False):
    returns = str(getattr(thing, "__annotations__", {}).get("return"))
    if not inspect.isfunction(thing) or "MaskUpdater" not in returns:
        return False
    return stored == ("blocks" in inspect.signature(thing).parameters)


def is_format(thing):
    return inspect.isclass(thing) and hasattr(thing, "__rmatmul__") and not is_protocol(thing)


def is_pattern(thing):
    return inspect.isclass(thing) and hasattr(thing, "gather") and not is_protocol(thing)


def is_score(thing):
    return inspect.isfunction(thing) and thing.__module__.startswith("jaxsparse.scores.")


def is_attention_pattern(thing):
    returns = str(getattr(thing, "__annotations__", {}).get("return"))
    return inspect.isfunction(thing) and returns == "BlockMask"


def is_router(thing):
    returns = str(getattr(thing, "__annotations__", {}).get("return"))
    return inspect.isfunction(thing) and returns == "Router"


def is_protocol(thing):
    return getattr(thing, "_is_protocol", False)


# Public things of this kind stand in this list of tests/conformance/. A new kind is one line.
LISTS = {
    "UPDATERS": is_updater,
    "STORED_UPDATERS": lambda thing: is_updater(thing, stored=True),
    "PATTERNS": is_pattern,
    "SCORES": is_score,
    "FORMATS": is_format,
    "ROUTERS": is_router,
    "ATTENTION_PATTERNS": is_attention_pattern,
}


def listed_names(sources):
    """`{"UPDATERS": {names and keys in its value}}` for every list of tests/conformance/."""
    found = {}
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
                used |= {n.attr for n in ast.walk(node.value) if isinstance(n, ast.Attribute)}
                used |= {n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
                found.setdefault(ast.unparse(target), set()).update(used)
    return found


def check_documented(module, lists):
    bad = []
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, types.ModuleType) or not hasattr(thing, "__module__"):
            continue
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        doc = inspect.getdoc(thing) or ""
        where = f"{thing.__module__}.{name}"
        if not ("Example" in doc and ">>>" in doc) and not is_protocol(thing):
            bad.append(f"{where}: a public name has a docstring with an `Example:` doctest")
        for kind, belongs in LISTS.items():
            if kind in lists and belongs(thing) and name not in lists[kind]:
                bad.append(f"{where}: add it to {kind} in tests/conformance/")
    return bad


@pytest.mark.parametrize("check", [check_imports, check_lengths, check_no_logic])
def test_the_tree_keeps_the_rules(check):
    bad = check(read_tree())
    assert not bad, "\n".join(["", *bad])


def test_every_public_name_is_documented_and_listed():
    sources = [file.read_text() for file in (ROOT / "tests/conformance").rglob("*.py")]
    lists = listed_names(sources)
    rooms = (jaxsparse, jaxsparse.attention, jaxsparse.moe)
    bad = [complaint for room in rooms for complaint in check_documented(room, lists)]
    assert not bad, "\n".join(["", *bad])


SMALL = {
    "jaxsparse/__init__.py": "from jaxsparse.training._set import patterns\n\n__all__ = []\n",
    "jaxsparse/_tree.py": "import jax\n",
    "jaxsparse/_masks.py": "from jaxsparse._tree import paths\nfrom jaxsparse.patterns import NM\n",
    "jaxsparse/patterns.py": "import numpy as np\n",
    "jaxsparse/scores/__init__.py": "from jaxsparse.scores._snip import snip\n",
    "jaxsparse/scores/_snip.py": "import jax.numpy as jnp\nfrom .._masks import density\n",
    "jaxsparse/oneshot/_prune.py": "",
    "jaxsparse/training/_set.py": "from jaxsparse.patterns import NM\n",
    "jaxsparse/formats/_csr.py": "",
    "jaxsparse/nn/_linear.py": "import flax\n",
    "jaxsparse/checkpoint.py": "import orbax.checkpoint as ocp\nimport jaxsparse.training._set\n",
    "pallas_kernels/__init__.py": "import jax\n",
    "models/vit.py": "from flax import nnx\nfrom jaxsparse.nn import _linear\n",
    "experiments/train_lm.py": "import rich, jaxsparse as jsp\nfrom models.vit import ViT\n",
}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("_masks.py", "\nimport jaxsparse.plans", "there is no file for jaxsparse.plans"),
        ("_masks.py", "\nfrom jaxsparse.scores._snip import snip", "`_masks` may not import room"),
        ("patterns.py", "def f():\n    from . import _masks", "`patterns` may not import room"),
        ("training/_set.py", "import jaxsparse.oneshot._prune", "import room `oneshot`"),
        ("patterns.py", "\nfrom jaxsparse.formats._csr import CSR", "room `formats`"),
        ("training/_set.py", "\nfrom jaxsparse.scores import snip", "import the file that defines"),
        ("_masks.py", "\nfrom jaxsparse import patterns", "an export hides the file"),
        ("training/_set.py", "import jaxsparse", "`training` may not import room `jaxsparse`"),
        ("training/_set.py", "\nfrom flax import nnx", "`training` may not import flax"),
        ("_masks.py", "import orbax.checkpoint", "`_masks` may not import orbax"),
        ("_tree.py", "\nfrom jaxsparse.patterns import NM", "`_tree` may not import room"),
        ("new_room.py", "", "unknown room `new_room`"),
        ("_report.py", "\nfrom models.vit import ViT", "`_report` may not import room `models`"),
        ("../pallas_kernels/_mm.py", "import numpy", "`pallas_kernels` may not import numpy"),
        ("../pallas_kernels/_mm.py", "import jaxsparse._masks", "may not import room `_masks`"),
        ("../models/vit.py", "\nimport experiments.train_lm", "import room `experiments`"),
        ("../models/vit.py", "from jaxsparse.training._set import set_", "room `training`"),
    ],
)
def test_a_forbidden_import_is_named(path, source, complaint):
    assert not check_imports(SMALL)
    path = f"jaxsparse/{path}".replace("jaxsparse/../", "")
    (bad, *_) = check_imports({**SMALL, path: source})
    line = source.count("\n") + 1
    assert bad.startswith(f"{path}:{line}: ") and complaint in bad


def test_a_long_file_is_named():
    assert not check_lengths({"models/vit.py": "\n" * MAX_LINES})
    (bad,) = check_lengths({"models/vit.py": "\n" * (MAX_LINES + 1)})
    assert bad.startswith("models/vit.py:401: ")


def test_logic_in_the_init_is_named():
    path = "jaxsparse/__init__.py"
    assert not check_no_logic(SMALL)
    for logic in ("if 1:\n    import jax", "x = 1", "def f(): ...", "print()"):
        (bad,) = check_no_logic({path: SMALL[path] + logic})
        assert bad.startswith(f"{path}:4: ")


def test_an_undocumented_or_unlisted_name_is_named():
    def adam_like() -> "MaskUpdater":  # noqa: F821
        """One line."""

    class Stripes:
        """Stripes.

        Example:
            >>> Stripes()
        """

        gather = None

    module = types.SimpleNamespace(
        __all__=["adam_like", "Stripes", "types"], adam_like=adam_like, Stripes=Stripes, types=types
    )
    lists = listed_names(["UPDATERS = [lambda: jsp.adam_like(0.5)]\nPATTERNS: list = [NM(2, 4)]\n"])
    first, second = check_documented(module, lists)
    assert "adam_like: a public name has a docstring" in first
    assert "Stripes: add it to PATTERNS" in second
    assert not check_documented(module, {})[1:]
