"""The folders of saves: which are there, which are sound, which to use.

A save writes one folder, `000012-step-3400`. The first number counts the saves: the newest is the
one written last, and no folder is ever overwritten. `jaxsparse.json` in it holds what the caller
says of the save, and the size and digest of every other file; its first line is its own digest.
The writer works under another name, lets `write_manifest` come last, and commits by renaming. So a
folder with its final name was whole once, one without was cut off, and a file that has changed
since belies its digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from typing import Any, NamedTuple

from etils import epath

Manifest = dict[str, Any]

_MANIFEST = "jaxsparse.json"


class Folder(NamedTuple):
    """What one save has left; sorts by the order of the saves."""

    order: int
    step: int
    whole: bool  # it has its final name
    path: epath.Path


def folder_name(order: int, step: int) -> str:
    """The final name of a folder."""
    return f"{order:06d}-step-{step}"


def folders(directory: epath.Path) -> list[Folder]:
    """What saves have left in a directory, newest first; other names are not looked at."""
    found = []
    for path in directory.iterdir() if directory.exists() else ():
        if match := re.match(r"(\d+)-step-(\d+)", path.name):
            whole = match[0] == path.name
            found.append(Folder(int(match[1]), int(match[2]), whole, path))
    return sorted(found, reverse=True)


def write_manifest(path: epath.Path, about: Manifest, items: tuple[str, ...]) -> None:
    """Write what is said `about` a save, with the digest of every file under `path / item`."""
    files = {
        str(file.relative_to(path)): [file.stat().length, _digest(file)]
        for item in items
        for file in _files(path / item)
    }
    text = json.dumps(about | {"files": files})
    (path / _MANIFEST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def inspect(
    folder: Folder, items: tuple[str, ...], *, digests: bool = True
) -> tuple[Manifest, str]:
    """The manifest, and what is wrong with it or with the files of these items ("": nothing)."""
    if not folder.whole:
        return {}, "never finished"
    if not (folder.path / _MANIFEST).exists():
        return {}, f"{_MANIFEST} is missing"
    digest, _, text = (folder.path / _MANIFEST).read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return {}, f"{_MANIFEST} was altered"
    manifest = json.loads(text)
    for name, (size, digest) in manifest["files"].items():
        path = folder.path / name
        if name.split("/")[0] not in items:
            continue
        if not path.exists():
            return manifest, f"{name} is missing"
        if path.stat().length != size:
            return manifest, f"{name} has {path.stat().length} bytes instead of {size}"
        if digests and _digest(path) != digest:
            return manifest, f"{name} was altered"
    return manifest, ""


def find(
    directory: epath.Path, items: tuple[str, ...], step: int | None = None
) -> tuple[epath.Path, Manifest] | None:
    """The newest folder whose `items` are sound; warns of those it passes over.

    Returns None where no save has ever finished; raises a RuntimeError where some have and none is
    sound, and a ValueError where none is of `step`.
    """
    candidates, faults, found = folders(directory), [], None
    if step is not None:
        steps = sorted({folder.step for folder in candidates if folder.whole})
        candidates = [folder for folder in candidates if folder.whole and folder.step == step]
        if not candidates:
            raise ValueError(f"{directory} has no checkpoint of step {step}, only of {steps}.")
    for folder in candidates:
        manifest, fault = inspect(folder, items)
        if not fault:
            found = folder.path, manifest
            break
        faults.append(f"{folder.path.name} ({fault})")
    passed = f"{directory}: cut off or damaged: {', '.join(faults)}"
    if found is None and any(folder.whole for folder in candidates):
        mend = "Put back a copy of one, or use another directory to start anew."
        raise RuntimeError(f"{passed}. There is no sound checkpoint. {mend}")
    if faults:
        instead = f"the one before, {found[0].name}, is used" if found else "none is before it"
        warnings.warn(f"{passed}; {instead}.", stacklevel=3)
    return found


def _files(path: epath.Path) -> list[epath.Path]:
    if path.is_dir():
        return [file for child in path.iterdir() for file in _files(child)]
    return [path] if path.exists() else []


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore
