"""Text as bytes: reading it, holding part of it out, and batches that depend only on the step."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

BUNDLED = Path(__file__).parent / "data" / "state_of_the_union.txt.gz"
HOLD_OUT = 20  # one part in 20


class Text(NamedTuple):
    """A text split in two: uint8 arrays of bytes.

    Attributes:
        train: [N] bytes to learn from.
        valid: [M] bytes to measure on, from parts of the text that `train` has nothing of.
        held_out: the first line of each held-out part.
        digest: SHA-256 of the file's text.
    """

    train: np.ndarray
    valid: np.ndarray
    held_out: tuple[str, ...]
    digest: str


def load(path: str | Path = BUNDLED, *, context: int) -> Text:
    """Read a UTF-8 text (.txt or .gz) and hold a twentieth of it out.

    A text with at least 20 parts that begin with a line `# ...` (the bundled one: addresses) gives
    every 20th part, whole; of any other text the last twentieth is held out.

    Args:
        path: the file.
        context: bytes of a training window; both halves must hold one window and a byte.

    Raises:
        ValueError: no such file, not a readable file, empty, not UTF-8, or too short; names the
            file.
    """
    raw = _read(Path(path))
    if not raw.strip():
        raise ValueError(f"{path} is empty. Give a text of at least {HOLD_OUT * (context + 1)} B.")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start:,} "
            f"({error.reason}). Convert it, for example: iconv -f latin1 -t utf-8 IN > OUT"
        ) from None
    starts = [match.start() for match in re.finditer(rb"^# ", raw, re.MULTILINE)]
    if len(starts) >= HOLD_OUT:
        bounds = [0, *starts[1:], len(raw)]
        parts = [raw[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        chosen = range(HOLD_OUT // 2, len(parts), HOLD_OUT)
        valid = [parts[i] for i in chosen]
        train = [part for i, part in enumerate(parts) if i not in chosen]
    else:
        cut = len(raw) - len(raw) // HOLD_OUT
        train, valid = [raw[:cut]], [raw[cut:]]
    names = tuple(part.split(b"\n", 1)[0].decode(errors="replace")[:60] for part in valid)
    halves = [np.frombuffer(b"".join(half), np.uint8) for half in (train, valid)]
    for half, name in zip(halves, ("for training", "held out for validation"), strict=True):
        if len(half) < context + 1:
            raise ValueError(
                f"{path} is too short: {len(half):,} of its {len(raw):,} bytes are {name}, and a "
                f"window needs {context + 1}. Give a longer text or a smaller --context."
            )
    return Text(*halves, names, hashlib.sha256(raw).hexdigest())


def _read(path: Path) -> bytes:
    if not path.exists():
        raise ValueError(f"{path} does not exist. Give a text file, .txt or .gz, with --data.")
    if path.is_dir():
        raise ValueError(f"{path} is a directory. Give a text file, .txt or .gz, with --data.")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def batches(train: np.ndarray, *, context: int, batch: int, seed: int) -> Any:
    """Training windows, indexed by step: `batches(...)[step]` is int32 [batch, context + 1].

    The text is cut into windows of `context` bytes (each with the byte after it); every epoch
    takes them all once, in an order of its own. A batch is a function of seed and step alone, so
    a run that goes on needs no other position than its step.
    """
    offsets = np.arange(context + 1)
    return (
        grain.MapDataset.range((len(train) - 1) // context)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch)
        .map(lambda windows: train[windows[:, None] * context + offsets].astype(np.int32))
    )


def windows(valid: np.ndarray, *, context: int, batch: int, limit: int | None = None) -> Any:
    """Cut held-out bytes to measure on: (tokens [batch, context + 1], weights [batch, context]).

    Every byte but the first is predicted exactly once, from at most `context` bytes before it; the
    weights are 0 on the padding of the last window. `limit` takes that many windows, evenly spread.
    """
    count = -(-(len(valid) - 1) // context)
    chosen = np.arange(count)
    if limit is not None and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    padded = np.pad(valid, (0, count * context + 1 - len(valid)))
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        at = np.pad(rows, (0, batch - len(rows)))[:, None] * context + np.arange(context + 1)
        real = (np.arange(batch) < len(rows))[:, None] & (at[:, 1:] < len(valid))
        yield padded[at].astype(np.int32), real.astype(np.float32)
