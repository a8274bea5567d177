"""Read how long a TPU kernel's steady loop is from the schedule that its compiler writes.

A TPU core issues one bundle of instructions a cycle, and libtpu can write the final bundles of all
kernels it compiles. A grid step then takes at least as many cycles as bundles lie on its usual
path. That path is followed here for kernels of this shape: one loop over grid steps, whose body has
a full arm with all products unrolled, and for groups that are not full an arm that loops over them.

Stalls and the latency of copies are not in a schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

from experiments.tpu_compile import compile_for, devices_of

_COPY_IN = re.compile(r" dma\.(hbm_to_vmem|general)\b")
# Options of libtpu, read once a process. Only the last of about 70 stages is of interest.
_OPTIONS = (
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_emit_annotations=true",  # else branch targets have no names
    "--xla_jf_dump_llo_pass_label_regex=final_(bundles|hlo-static-per-bundle-utilization)",
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundles of one kernel.

    Attributes:
        step: Of a grid step with a full group that is not the last of its output block.
        end: In branches that such a step skips: storing an output block, clearing sums.
        turn: Of one turn of a loop that only moves data through the transpose unit; else 0.
        spills: Registers stored for want of room, in the whole kernel.
    """

    step: int
    end: int
    turn: int
    spills: int


@functools.cache
def dump_folder() -> tempfile.TemporaryDirectory[str]:
    """Where libtpu puts its schedules; ask before it compiles anything, for it reads this once."""
    if devices_of.cache_info().currsize:
        raise RuntimeError(
            "libtpu has read its options; call dump_folder before anything is compiled"
        )
    folder = tempfile.TemporaryDirectory(prefix="tpu_schedule_")
    options = (os.environ.get("LIBTPU_INIT_ARGS", ""), f"--xla_jf_dump_to={folder.name}", *_OPTIONS)
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(options).strip()
    return folder


def schedule(topology: str, function: Callable[..., Any], *structs: Any, kernel: str) -> Schedule:
    """Compile `function` and read the `pallas_call` of the name `kernel`, the last if several.

    Raises:
        LookupError: If there is none; names what there is.
        RuntimeError: If libtpu was used before without this.
    """
    return read(*written(topology, function, *structs, kernel=kernel))


def written(
    topology: str, function: Callable[..., Any], *structs: Any, kernel: str
) -> tuple[str, str, int]:
    """What `read` takes, of the kernel that `schedule` reads."""
    folder = pathlib.Path(dump_folder().name)
    for path in folder.iterdir():
        path.unlink()
    compile_for(topology, function, *structs)
    bundles = sorted(folder.glob(f"*-{kernel}.*[0-9]-final_bundles.txt"))
    use = sorted(folder.glob(f"*-{kernel}.*[0-9]-final_hlo-static-per-bundle-utilization.txt"))
    if not bundles or not use:
        found = {re.sub(r"^\d+-(.*?)-\d+-.*", r"\1", path.name) for path in folder.iterdir()}
        raise LookupError(f"no kernel {kernel!r} was compiled; there are {sorted(found)}")
    delay = 1 if topology.startswith("tpu7x") else 4  # bundles issued after a branch, taken or not
    return bundles[-1].read_text(), use[-1].read_text(), delay


def read(bundles: str, use: str, delay: int) -> Schedule:
    """The schedule from the text of the bundles, and of the table of units that each one uses."""
    way = walk(bundles, use, delay)
    return Schedule(*way.path(), way.turns(), way.spills)


def read_nested(bundles: str, use: str, delay: int) -> Schedule:
    """The same of a kernel whose grid step is a loop: `step` of a turn of it, `end` beside it."""
    way = walk(bundles, use, delay)
    return Schedule(*way.nested(), way.turns(), way.spills)


def walk(bundles: str, use: str, delay: int) -> Walk:
    """The branches and units that `read` follows, from the same texts."""
    header, *rows = use.splitlines()[1:]
    names = [name.split(":")[-1].strip() for name in header.split(",")]
    units = [
        dict(zip(names, map(int, row.split()), strict=True)) for row in rows[2:] if row.strip()
    ]
    lines = _split(bundles)
    return Walk(
        delay=delay,
        jumps=_jumps(lines),
        product=[row["MATMUL"] > 0 for row in units],
        turn=[row["XLU"] > 0 for row in units],
        store=[row["VSTORE"] > 0 for row in units],
        copy=[bool(_COPY_IN.search(lines.get(at, ""))) for at in range(len(units))],
        spills=sum(row["SPILL"] for row in units),
    )


def _split(text: str) -> dict[int, str]:
    """Bundle number -> text; a bundle may go over several lines."""
    head = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+(?:[A-Z]{2}(?:[, ]+[A-Z]{2})*)?\s*:.*?\{")
    found: dict[int, str] = {}
    at = None
    for line in text.splitlines():
        match = head.match(line)
        if match:
            at = int(match.group(1), 16)
            found[at] = ""
        if at is not None:
            found[at] += line + "\n"
    return found


def _jumps(lines: dict[int, str]) -> dict[int, int]:
    """Bundle of a branch -> bundle it goes to; regions stand in comments."""
    starts: dict[str, int] = {}
    for at, text in lines.items():
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", text):
            starts.setdefault(region, at)
    branches = ((at, re.search(r"sbr\.rel[^;]*?\$region(\d+)", text)) for at, text in lines.items())
    return {at: starts[m.group(1)] for at, m in branches if m and m.group(1) in starts}


@dataclasses.dataclass(frozen=True)
class Walk:
    """The path of the usual step, from the branches and what each bundle does."""

    delay: int
    jumps: dict[int, int]
    product: list[bool]
    turn: list[bool]
    store: list[bool]
    copy: list[bool]
    spills: int

    def loops(self, begin: int, end: int) -> list[range]:
        """Loops within these bundles."""
        found = (range(to, at + 1 + self.delay) for at, to in self.jumps.items() if to <= at)
        return [loop for loop in found if begin <= loop.start and loop.stop <= end]

    def plain(self, begin: int, end: int) -> list[int]:
        """Bundles that are in no loop."""
        looped = set().union(*self.loops(begin, end))
        return [at for at in range(begin, end) if at not in looped]

    def fetches(self, begin: int, end: int) -> bool:
        """Whether these bundles do nothing but start the copies of a group."""
        copies = any(self.copy[at] for at in self.plain(begin, end))
        return (
            copies
            and bool(self.loops(begin, end))
            and not any(self.store[begin:end] + self.turn[begin:end])
        )

    def steady_fetch(self, regions: list[range]) -> set[int]:
        """Where the branches begin that start the copies of the next step."""
        fetches = [region for region in regions if self.fetches(region.start, region.stop)]
        outer = [
            region
            for region in fetches
            if not any(o.start < region.start and region.stop <= o.stop for o in fetches)
        ]
        if not outer:
            return set()
        last = outer[-1]  # the first one fills the pipeline
        # Of two weights each has its own branch within, and a step takes one of them.
        inner = [r.start for r in fetches if last.start < r.start and r.stop <= last.stop]
        return {last.start, *inner[-1:]}

    def grid(self) -> range:
        """The loop over grid steps: the longest one that multiplies."""
        loops = self.loops(0, len(self.product))
        return max((loop for loop in loops if any(self.product[i] for i in loop)), key=len)

    def branches(self, grid: range) -> list[tuple[int, int, int]]:
        """What can be jumped over in a step: the jump, and from where to where."""
        return [
            (at, at + 1 + self.delay, to)
            for at, to in sorted(self.jumps.items())
            if at in grid and at + 1 + self.delay < to < grid.stop
        ]

    def path(self) -> tuple[int, int]:
        """Bundles of the usual step, and of what it jumps over that has no loop."""
        grid = self.grid()
        branches = self.branches(grid)
        steady = self.steady_fetch([range(first, to) for _, first, to in branches])
        step, end, at = 0, 0, grid.start
        for branch, first, to in branches:
            plain = self.plain(first, to)
            if branch < at or first in steady or any(self.product[i] for i in plain):
                continue  # inside what is jumped over, or not jumped over
            step, at = step + first - at, to
            partial = any(self.product[first:to]) or self.fetches(first, to)
            end += 0 if partial else len(plain)
        return step + grid.stop - at, end

    def nested(self) -> tuple[int, int]:
        """Bundles of a turn of the innermost loop that multiplies, and of the outermost beside it.

        Branches are taken over what has no product, if it also has a loop or starts no copy.
        """
        loops = [
            loop for loop in self.loops(0, len(self.product)) if any(self.product[i] for i in loop)
        ]
        inner, outer = min(loops, key=len), max(loops, key=len)

        def usual(loop: range) -> set[int]:
            here = set(loop)
            for at, to in self.jumps.items():
                region = range(at + 1 + self.delay, to)
                copies = any(self.copy[i] for i in region)
                if at not in loop or to > loop.stop or any(self.product[i] for i in region):
                    continue
                if self.loops(region.start, region.stop) or not copies:
                    here -= set(region)
            return here

        return len(usual(inner)), len(usual(outer) - set(inner))

    def turns(self) -> int:
        """Length of the loop that moves data through the transpose unit and multiplies nothing."""
        loops = self.loops(0, len(self.product))
        return max(
            (
                len(loop)
                for loop in loops
                if any(self.turn[i] for i in loop) and not any(self.product[i] for i in loop)
            ),
            default=0,
        )
