"""Options of the main job, and the one place where names on the command line become objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

import jaxsparse as jsp
from experiments.text import BUNDLED
from models.transformer import SIZES, Config

MATRICES = "layers/*/kernel"
"""What is pruned: every matrix of the blocks. Embedding, norms and head stay dense."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The model and its text."""

    model: Literal["tiny", "small", "wide", "base", "medium", "large", "1b"] = "wide"
    """Size; wide is for stored blocks on two cores, small for dense weights and masks there."""
    width: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Another width for that size, its SwiGLU in proportion: for a dense model of equal cost."""
    context: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Bytes in a training window; the size's own if not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matrix products; parameters stay float32."""
    data: Path = BUNDLED
    """Your own text, .txt or .gz, UTF-8; every byte is a token."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Training: AdamW, linear warm-up, cosine decay to a tenth."""

    steps: int = 2000
    """Optimizer steps."""
    batch: int = 4
    """Windows in a step."""
    learning_rate: float = 4e-2
    """At the end of the warm-up, for embedding, norms and head."""
    matrix_rate: float = 0.015
    """Times the learning rate, for dense matrices; sparse ones take density**-0.5 times that."""
    warmup: float = 0.05
    """Share of the steps."""
    weight_decay: float = 0.1
    """Of AdamW, on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Of weights, batches and masks."""


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Sparsity, in every matrix of the blocks; embedding, norms and head stay dense."""

    algorithm: Literal[
        "block_rigl",
        "block_set",
        "block_static",
        "rigl",
        "srigl",
        "set",
        "static",
        "gradual",
        "blast",
        "ste",
        "sr_ste",
        "dense",
    ] = "block_set"
    """How masks come about; block_... store blocks alone and compute with nothing else."""
    sparsity: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Share of weights removed; 0.9 if not given, 1 - n/m with --pattern nm."""
    distribution: Literal["uniform", "erk", "global", "lamp"] = "uniform"
    """How the sparsity is shared out among the matrices."""
    pattern: Annotated[
        Literal["unstructured", "nm", "block", "channel", "fan_in"] | None,
        tyro.conf.arg(metavar="{unstructured,nm,block,channel,fan_in}"),
    ] = None
    """Which weights live or die together; if not given, block for block_..., fan_in for srigl, else
    unstructured."""
    nm: tuple[int, int] = (2, 4)
    """With --pattern nm: n kept of m."""
    block: tuple[int, int] = (32, 128)
    """With --pattern block: rows and columns of a block."""
    every: int = 100
    """Steps between mask updates (all but static and ste)."""
    drop_fraction: float = 0.1
    """Share of kept weights replaced in an update (rigl, set, blast); a cosine takes it to 0."""
    until: float = 0.75
    """Share of the steps after which masks rest (rigl, set) or are at full sparsity (gradual)."""


@dataclasses.dataclass(frozen=True)
class Output:
    """Output, checkpoints and comparison."""

    out: Path = Path("runs/train_lm")
    """Directory of the run; the same command goes on from the last checkpoint in it."""
    fresh: bool = False
    """Delete the run in --out and begin anew."""
    compare: bool = False
    """Train the dense model the same way afterwards, for the table."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 300
    """Steps between validations on part of the held-out text."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a language model with sparse weights on bytes of text, and show what came out."""

    model: Model = dataclasses.field(default_factory=Model)
    training: Training = dataclasses.field(default_factory=Training)
    sparse: Sparsity = dataclasses.field(default_factory=Sparsity)
    output: Output = dataclasses.field(default_factory=Output)

    def __post_init__(self) -> None:
        """Raise ValueError on a number that makes no sense, before any work."""
        t, s, o = self.training, self.sparse, self.output
        least_one = {
            "steps": t.steps,
            "batch": t.batch,
            "every": s.every,
            "log-every": o.log_every,
            "validate-every": o.validate_every,
            "checkpoint-every": o.checkpoint_every,
            **{
                name: size
                for name in ("context", "width")
                if (size := getattr(self.model, name)) is not None
            },
        }
        for name, value in least_one.items():
            if value < 1:
                raise ValueError(f"--{name} must be at least 1; got {value}.")
        for name, value in {
            "warmup": t.warmup,
            "until": s.until,
            "drop-fraction": s.drop_fraction,
        }.items():
            if not 0 <= value <= 1:
                raise ValueError(f"--{name} must be in [0, 1]; got {value}.")
        if s.sparsity is not None and not 0 <= s.sparsity < 1:
            raise ValueError(f"--sparsity must be in [0, 1); got {s.sparsity}.")
        if s.algorithm in STORED and pattern(s) != "block":
            raise ValueError(f"--algorithm {s.algorithm} stores blocks: leave --pattern out.")
        if s.sparsity is not None and s.pattern == "nm":
            raise ValueError(
                f"--pattern nm with --nm {s.nm[0]} {s.nm[1]} has sparsity {1 - s.nm[0] / s.nm[1]}: "
                "leave --sparsity out."
            )


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line; a mistake is explained and ends the program."""
    return tyro.cli(
        Options,
        args=arguments,
        prog="python -m experiments.train_lm",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def model_config(options: Options) -> Config:
    """The model's shape."""
    config = SIZES[options.model.model]
    context, width = options.model.context or config.context, options.model.width or config.width
    hidden = 32 * round(config.hidden * width / config.width / 32)
    dtype = jnp.dtype(options.model.dtype)
    return dataclasses.replace(config, width=width, hidden=hidden, context=context, dtype=dtype)


def learning_rate(options: Training) -> optax.Schedule:
    """Linear warm-up, cosine decay to a tenth; a function of the step alone."""
    warmup = max(1, round(options.warmup * options.steps))
    return optax.warmup_cosine_decay_schedule(
        0.0,
        options.learning_rate,
        warmup,
        max(options.steps, warmup + 1),
        options.learning_rate / 10,
    )


def optimizer(options: Options, algorithm: str) -> optax.GradientTransformation:
    """Clipping and AdamW without decay of norms, with a learning rate of their own for matrices.

    Dense matrices take `matrix_rate` times the learning rate. Sparse ones take 1 / sqrt(density)
    times that: weights of k inputs instead of K are sqrt(K / k) times as large from the start, and
    AdamW moves each by about the learning rate, so they change as fast in proportion. Where weights
    are dense at first (gradual) or throughout (ste, sr_ste) they count as dense.
    """
    t, sparse = options.training, algorithm in ("static", "set", "rigl", "srigl", *STORED)
    factor = t.matrix_rate / (1 - target_sparsity(options.sparse) if sparse else 1) ** 0.5

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in _name(path), params)

    def stretch(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, u: factor * u if fnmatch(_name(path), f"{MATRICES}*") else u, updates
        )

    return optax.chain(
        optax.clip_by_global_norm(t.clip),
        optax.adamw(learning_rate(t), b2=0.98, weight_decay=t.weight_decay, mask=decayed),
        optax.stateless(stretch),
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


PATTERNS: dict[str, Callable[[Sparsity], Any]] = {
    "unstructured": lambda s: jsp.Unstructured(),
    "nm": lambda s: jsp.NM(*s.nm),
    "block": lambda s: jsp.Block(s.block),
    "channel": lambda s: jsp.Channel(-1),
    "fan_in": lambda s: jsp.FanIn(),
}

DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "uniform": jsp.uniform,
    "erk": jsp.erk,
    "global": jsp.global_,
    "lamp": jsp.lamp,
}


def pattern(s: Sparsity) -> str:
    """Name of the pattern: the one asked for, or what suits the algorithm."""
    natural = {"srigl": "fan_in", **dict.fromkeys(STORED, "block")}
    return s.pattern or natural.get(s.algorithm, "unstructured")


def target_sparsity(s: Sparsity) -> float:
    """Share of the pruned matrices' weights that is removed in the end."""
    if s.algorithm == "dense":
        return 0.0
    if s.pattern == "nm":
        return 1 - s.nm[0] / s.nm[1]
    return 0.9 if s.sparsity is None else s.sparsity


def distribution(s: Sparsity) -> Any:
    """What the library calls a distribution: params -> plan."""
    return DISTRIBUTIONS[s.distribution](
        target_sparsity(s), pattern=PATTERNS[pattern(s)](s), where=MATRICES
    )


def _moving(options: Options) -> dict[str, Any]:
    """Arguments that rigl and set share."""
    s, stop = options.sparse, max(1, round(options.sparse.until * options.training.steps))
    return {
        "key": jax.random.key(options.training.seed + 1),
        "when": jsp.every(s.every, start=s.every, stop=stop),
        "drop_fraction": optax.cosine_decay_schedule(s.drop_fraction, stop),
    }


def _rising(options: Options) -> dict[str, Any]:
    """Arguments that gradual and blast share."""
    s, end = options.sparse, max(1, round(options.sparse.until * options.training.steps))
    return {"schedule": jsp.cubic(end // 10, end), "when": jsp.every(s.every)}


ALGORITHMS: dict[str, Callable[[Options], Any]] = {
    "rigl": lambda o: jsp.rigl(distribution(o.sparse), **_moving(o)),
    "set": lambda o: jsp.set_(distribution(o.sparse), **_moving(o)),
    "static": lambda o: jsp.static(distribution(o.sparse), key=jax.random.key(o.training.seed + 1)),
    "srigl": lambda o: jsp.srigl(distribution(o.sparse), **_moving(o)),
    "gradual": lambda o: jsp.gradual(distribution(o.sparse), **_rising(o)),
    "blast": lambda o: jsp.blast(
        distribution(o.sparse), **_rising(o), drop_fraction=o.sparse.drop_fraction
    ),
    "ste": lambda o: jsp.ste(distribution(o.sparse)),
    "sr_ste": lambda o: jsp.sr_ste(distribution(o.sparse)),
}

STORED: dict[str, Callable[[Options, Any], Any]] = {
    "block_rigl": lambda o, blocks: jsp.block_rigl(blocks, **_moving(o)),
    "block_set": lambda o, blocks: jsp.block_set(blocks, **_moving(o)),
    "block_static": lambda o, blocks: jsp.block_static(blocks),
}
"""Algorithms that train stored blocks, which come from `jsp.blockify`."""

DENSE_GRADIENT: dict[str, Callable[[Options], float]] = {
    "rigl": lambda o: o.sparse.until / o.sparse.every,
    "srigl": lambda o: o.sparse.until / o.sparse.every,
    "blast": lambda o: o.sparse.until / o.sparse.every,
    "ste": lambda o: 1.0,
    "sr_ste": lambda o: 1.0,
}
"""Share of the steps at which an algorithm needs the gradient of absent weights too; else none."""


def identity(options: Options, digest: str, algorithm: str) -> dict[str, Any]:
    """What decides the losses of a run, JSON-able: a run directory belongs to one of these."""
    found = {
        "model": dataclasses.asdict(options.model) | {"data": digest},
        "training": dataclasses.asdict(options.training),
    }
    if algorithm != "dense":
        found["sparse"] = dataclasses.asdict(options.sparse)
    return found
