"""Tile choices measured on a device: `tuned/<device>.json`, one entry a kernel and shape.

`experiments/tune_kernels.py` writes them. A device without a file, or a shape unlike all measured
ones, gets the choice that the kernel makes by arithmetic; so does an entry that does not fit.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"
ALIKE = 2.0  # sizes of a measured shape may differ by this factor
SIZES = ("rows", "live")  # compared by ratio; every other key must be equal


@functools.cache
def read(path: Path) -> tuple[dict[str, Any], ...]:
    """The entries of a file, {"problem": ..., "tiles": ...} each; none if it is not there."""
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()


def tiles(device: str, problem: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tiles of the measured shape most like `problem`, or None.

    Args:
        device: Name of the file.
        problem: Kernel, block, dtype and depth, which must be equal, and the sizes in `SIZES`:
            rows of x and blocks stored a line, which may differ by the factor `ALIKE`.
    """
    best, distance = None, math.log(ALIKE) + 1e-9
    for entry in read(FOLDER / f"{device}.json") if device else ():
        measured = entry["problem"]
        if any(measured[key] != value for key, value in problem.items() if key not in SIZES):
            continue
        apart = max(abs(math.log(measured[key] / problem[key])) for key in SIZES)
        if apart <= distance:
            best, distance = entry["tiles"], apart
    return best
