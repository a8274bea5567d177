"""What a run leaves and shows while it goes: metrics.jsonl, and a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Metrics:
    """metrics.jsonl: one JSON object a line, steps rising, none twice.

    Args:
        path: the file.
        done: steps that the restored checkpoint has done; later lines, and a torn last one, are
            cut off, for these steps will be run again.

    Attributes:
        before: the records kept that tell of masks.
    """

    def __init__(self, path: Path, *, done: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= done]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)
        self.before = [record for record in kept if "sparsity" in record]
        self._file = path.open("a", buffering=1)  # a line is with the system once written

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole records of metrics.jsonl, in order; a line torn by a kill ends them."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class Display:
    """Shows a run: a bar in a terminal, a plain line about every ten seconds elsewhere.

    Args:
        console: where to.
        name: of the run, such as `rigl`.
        total: steps of the run.
        done: steps done before.
        tokens: tokens of a step.
        interval: seconds between plain lines.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        *,
        total: int,
        done: int,
        tokens: int,
        interval: float = 10.0,
    ) -> None:
        self._console, self._name, self._total, self._tokens = console, name, total, tokens
        self._interval, self._shown = interval, -interval
        self._start: float | None = None  # set after the first step: compiling is no training
        self._first, self._loss = done, None
        self.sparsity: float | None = None
        self.rate: float | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, text="compiling")
        if done:
            self.say(f"{name}: going on after step {done} of {total}")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def loss(self, value: float) -> None:
        """Take a loss in nats a byte into the running mean that is shown."""
        self._loss = value if self._loss is None else 0.8 * self._loss + 0.2 * value

    def step(self, done: int) -> None:
        """Show that `done` steps are done."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._first = now, done
        elif done > self._first:
            self.rate = (done - self._first) * self._tokens / max(now - self._start, 1e-9)
        parts = [
            "" if self._loss is None else f"loss {self._loss:.3f}",
            "" if self.rate is None else f"{self.rate:,.0f} tokens/s",
            "" if self.sparsity is None else f"sparsity {self.sparsity:.1%}",
            f"{clock(self.rate and (self._total - done) * self._tokens / self.rate)} left",
        ]
        text = "  ".join(filter(None, parts))
        self._bar.update(self._task, completed=done, text=text)
        due = now - self._shown >= self._interval or done == self._total
        if due and not self._console.is_terminal:
            self._shown = now
            print(f"{self._name} step {done}/{self._total}  {text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._console.is_terminal:
            self._console.print(text, highlight=False)
        else:
            print(text, flush=True)


def clock(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss; -:-- if unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def make_console() -> Console:
    """A console on stdout; 100 columns where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=100)
