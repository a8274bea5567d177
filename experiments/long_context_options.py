"""Options of `experiments/long_context.py`, and the kinds of attention that their names mean."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.recall import Recall
from experiments.text import BUNDLED
from jaxsparse.attention import BlockMask, NSASizes, s2, sliding_window
from models.nsa import NSA
from models.transformer import AttentionKind, Config, Dense, Static


@dataclasses.dataclass(frozen=True)
class Options:
    """Train one small model with four kinds of attention on recall and on text."""

    out: Path = Path("runs/long_context")
    """Directory of the runs; the same command goes on from what is in it."""
    arms: tuple[str, ...] = ("dense", "window", "s2", "nsa")
    """Which of dense, window, s2 and nsa."""
    seeds: int = 2
    """Runs of each, of weights and data."""
    width: int = 64
    """Of the model; two layers, two query heads, one key-value head of width 32."""
    block: int = 16
    """Tokens of a block, of every sparse kind."""
    query_block: int = 1
    """Queries that share a selection in NSA."""
    stages: tuple[tuple[int, int], ...] = ((64, 400), (256, 200), (768, 200))
    """(context, steps) of recall, one after the other; measured at the last context."""
    text_steps: int = 200
    """Steps on text, at the last context."""
    tokens: int = 2048
    """Tokens of a step; short contexts come in larger batches."""
    learning_rate: float = 5e-3
    """Of the matrices; embedding, norms and compression take ten times that."""
    data: Path = BUNDLED
    """The text."""
    every: int = 50
    """Steps between checkpoints, and between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        """Raise ValueError on what cannot be run."""
        if unknown := set(self.arms) - set(KINDS):
            raise ValueError(f"--arms must be some of {', '.join(KINDS)}; got {sorted(unknown)}.")
        for name in ("seeds", "width", "block", "text_steps", "tokens", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}.")

    @property
    def context(self) -> int:
        """Tokens of the last stage."""
        return self.stages[-1][0]


@dataclasses.dataclass(frozen=True)
class Near:
    """Tokens -> the mask of a window of five blocks and the query."""

    block: int

    def __call__(self, tokens: int) -> BlockMask:
        """See the class."""
        size = self.block
        return sliding_window((tokens, tokens), (size, size), left=5 * size)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Tokens -> the S2 mask of two heads: three local blocks, and every eighth in the past."""

    block: int

    def __call__(self, tokens: int) -> BlockMask:
        """See the class."""
        size = self.block
        return s2((tokens, tokens), (size, size), heads=2, stride=8, local=3)


def nsa(options: Options) -> AttentionKind:
    """A compressed token for each two blocks, one a block; selected are the own and one other."""
    size = options.block
    sizes = NSASizes(
        length=2 * size,
        stride=size,
        select_block=size,
        count=2,
        initial=0,
        local=1,
        window=size,
        query_block=options.query_block,
    )
    return NSA(sizes, hidden=None)


KINDS: dict[str, Any] = {
    "dense": lambda o: Dense(),
    "window": lambda o: Static(Near(o.block)),
    "s2": lambda o: Static(Shards(o.block)),
    "nsa": nsa,
}
"""Kinds of attention by name; sizes are such that the sparse ones cost alike."""


def model_config(options: Options, arm: str, task: str) -> Config:
    """The model, at the full context."""
    return Config(
        vocab=Recall().vocab if task == "recall" else 256,
        width=options.width,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=32,
        hidden=2 * options.width,
        rope_base=500_000.0,  # content must match over hundreds of tokens, with 16 wavelengths
        context=options.context,
        unroll=2,
        attention=KINDS[arm](options),
    )


def plan(options: Options, task: str) -> list[tuple[int, int]]:
    """(context, steps), one after the other."""
    return list(options.stages) if task == "recall" else [(options.context, options.text_steps)]


def identity(options: Options, task: str) -> dict[str, Any]:
    """What decides a run of a task, JSON-able."""
    others = {"recall": ("text_steps", "data"), "text": ("stages",)}[task]
    left_out = ("out", "arms", "seeds", "every", *others)
    fields = {k: v for k, v in dataclasses.asdict(options).items() if k not in left_out}
    if task == "text":
        fields["context"] = options.context
    return json.loads(json.dumps(fields, default=str))
