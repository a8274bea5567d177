"""Experts of domains that nobody named (c-BTM): cluster, branch, train apart, mix what they say.

`python -m experiments.c_btm --help` for the options. The text is cut into pieces, which are
clustered by their words. A model trained for a while on all of it is copied, one copy a cluster,
and each goes on alone: one `vmap`, no exchange. For a piece that nobody has seen, the experts
nearest to its first half are mixed, and measured on its second half, beside the dense model that
went on with all pieces for as many bytes.

Reference: Gururangan et al., Scaling expert language models with unsupervised domain discovery,
2023, arXiv:2303.14177.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.allocator import keep_freed_memory
from experiments.clusters import Clusters, fit_clusters
from experiments.log import make_console
from experiments.loop import write_json
from experiments.moe_training import Plan, make_arm, parameters
from experiments.text import BUNDLED, load
from models.transformer import Config


@dataclasses.dataclass(frozen=True)
class Options:
    """Experts of clusters against one dense model of as many trained bytes."""

    out: Path = Path("runs/c_btm")
    """Gets summary.json and table.md."""
    clusters: int = 8
    """C, and so many experts."""
    tops: tuple[int, ...] = (1, 2, 8)
    """How many experts are mixed; every one is measured."""
    temperature: float = 0.1
    """Of p(cluster | context); distances are of vectors of length one."""
    width: int = 64
    """Of the model; two layers."""
    context: int = 64
    """Bytes a model sees."""
    piece: int = 1024
    """Bytes of a piece."""
    batch: int = 16
    """Windows of a step of one expert; the dense model has C times as many."""
    seed_steps: int = 300
    """Before the branch, of batches as large as those of the dense model."""
    steps: int = 200
    """After the branch."""
    limit: int = 256
    """Held-out pieces, evenly spread."""
    learning_rate: float = 5e-3
    """Of the matrices at width 64; see `experiments/moe_training.py`."""
    seed: int = 0
    """Of weights, batches and clusters."""
    data: Path = BUNDLED
    """The text."""


def model_config(options: Options) -> Config:
    """The model, dense and as expert."""
    return Config(
        width=options.width,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=32,
        hidden=3 * options.width,
        context=options.context,
    )


def pieces_of(text: np.ndarray, size: int) -> np.ndarray:
    """The text cut into pieces uint8 [n, size]; the rest is left out."""
    count = len(text) // size
    return text[: count * size].reshape(count, size)


def draw(pieces: np.ndarray, batch: int, context: int, draws: np.random.Generator) -> np.ndarray:
    """Windows int32 [batch, context + 1] at random places of random pieces."""
    rows = draws.integers(len(pieces), size=batch)
    at = draws.integers(pieces.shape[1] - context, size=batch)
    return pieces[rows[:, None], at[:, None] + np.arange(context + 1)].astype(np.int32)


class Models:
    """Trains the dense model, branches it, and mixes the experts."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.arm = make_arm(model_config(options), options.learning_rate)

    def dense(self, start: Any, pieces: np.ndarray, plan: Plan) -> Any:
        """Parameters and optimizer after a plan on all pieces, C batches a step."""
        o, draws = self.options, np.random.default_rng([plan.seed, plan.first])
        params, state = jax.tree.map(jnp.copy, start)
        for number in range(plan.steps):
            tokens = draw(pieces, o.clusters * o.batch, o.context, draws)
            rate = jnp.float32(plan.rate(number))
            params, state, _ = self.arm.step(params, state, jnp.asarray(tokens), rate)
        return params, state

    def experts(self, start: Any, pieces: np.ndarray, groups: np.ndarray, plan: Plan) -> Any:
        """Parameters [C, ...] of copies of the start, each trained on its own cluster."""
        o, draws = self.options, np.random.default_rng([plan.seed, plan.first])
        copies = jax.tree.map(lambda x: jnp.repeat(x[None], o.clusters, 0), start)
        step = jax.jit(jax.vmap(self.arm.step, in_axes=(0, 0, 0, None)), donate_argnums=(0, 1))
        own = [pieces[groups == cluster] for cluster in range(o.clusters)]
        params, state = copies
        for number in range(plan.steps):
            tokens = np.stack([draw(some, o.batch, o.context, draws) for some in own])
            rate = jnp.float32(plan.rate(number))
            params, state, _ = step(params, state, jnp.asarray(tokens), rate)
        return params

    def log_probabilities(self, params: Any, pieces: np.ndarray) -> np.ndarray:
        """Log p of each byte in the second half of pieces: [C, n, bytes] for C stacked models."""
        context = self.options.context
        half = pieces.shape[1] // 2
        starts = range(half, pieces.shape[1] - context, context)
        graph = self.arm.graph

        @jax.jit
        def of(params, tokens):
            def one(params):
                logits = jax.nn.log_softmax(nnx.merge(graph, params)(tokens[:, :-1]))
                return jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]

            return jax.lax.map(one, params)

        found = [
            of(params, jnp.asarray(pieces[:, at : at + context + 1].astype(np.int32)))
            for at in starts
        ]
        return np.concatenate([np.asarray(x) for x in found], -1)


def mixed_bits(logs: np.ndarray, weights: np.ndarray) -> float:
    """Bits per byte of sum_c weights[n, c] p_c, from logs [C, n, bytes] of each expert's p."""
    p = np.einsum("nc,cnt->nt", weights, np.exp(logs.astype(np.float64)))
    return float(-np.log2(p).mean())


def run(options: Options, say: Any = print) -> dict[str, Any]:
    """Cluster, train and measure; returns what summary.json holds."""
    text = load(options.data, context=options.context)
    train, valid = (pieces_of(half, options.piece) for half in (text.train, text.valid))
    if options.piece < 2 * options.context + 2 or len(train) < options.clusters or not len(valid):
        raise ValueError(
            f"--piece {options.piece} must be more than twice --context {options.context}, and "
            f"give --clusters {options.clusters} a piece each; there are {len(train)} pieces."
        )
    valid = valid[np.unique(np.linspace(0, len(valid) - 1, options.limit).round().astype(int))]
    say(f"clustering {len(train)} pieces")
    clusters, groups = fit_clusters(
        [piece.tobytes() for piece in train], options.clusters, seed=options.seed
    )
    models, seed = Models(options), options.seed
    say("training: one model on all pieces, then one and its branches")
    base = models.dense(models.arm.init(seed), train, Plan(seed, options.seed_steps, decay=False))
    plan = Plan(seed, options.steps, first=options.seed_steps)
    dense = models.dense(base, train, plan)[0]
    experts = models.experts(base, train, groups, plan)
    return {
        "settings": settings(options),
        "sizes": np.bincount(groups, minlength=options.clusters).tolist(),
        "words": common_words(clusters),
        "parameters": parameters(model_config(options)),
        "bits_per_byte": measured(options, models, clusters, valid, base[0], dense, experts),
    }


def measured(
    options: Options,
    models: Models,
    clusters: Clusters,
    valid: np.ndarray,
    base: Any,
    dense: Any,
    experts: Any,
) -> dict[str, float]:
    """Bits per byte of the second halves of held-out pieces."""
    one = np.ones((len(valid), 1))
    found = {
        name: mixed_bits(models.log_probabilities(jax.tree.map(lambda x: x[None], p), valid), one)
        for name, p in (("before the branch", base), ("dense", dense))
    }
    logs = models.log_probabilities(experts, valid)
    contexts = [piece[: options.piece // 2].tobytes() for piece in valid]
    for top in options.tops:
        weights = clusters.likely(contexts, temperature=options.temperature, top=top)
        found[f"experts, top {top}"] = mixed_bits(logs, weights)
    even = np.full((len(valid), options.clusters), 1 / options.clusters)
    found["experts, mixed evenly"] = mixed_bits(logs, even)
    random = np.random.default_rng(0).integers(options.clusters, size=len(valid))
    found["experts, one at random"] = mixed_bits(logs, np.eye(options.clusters)[random])
    return found


def common_words(clusters: Clusters, count: int = 6) -> list[list[str]]:
    """Words that stand out in each cluster."""
    names = list(clusters.words)
    score = clusters.directions @ clusters.centres.T
    score = (score - score.mean(1, keepdims=True)) * clusters.idf[:, None]
    return [[names[i] for i in np.argsort(-column)[:count]] for column in score.T]


def settings(options: Options) -> dict[str, Any]:
    """What was run, and on what."""
    return {
        **json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "python": platform.python_version(),
        "jax": version("jax"),
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment, or read what it left; returns the exit status."""
    console = make_console()
    options = tyro.cli(Options, args=arguments, prog="python -m experiments.c_btm")
    finished = options.out / "summary.json"
    try:
        found = json.loads(finished.read_text()) if finished.exists() else None
        if found is None:
            found = run(options, console.print)
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(finished, found)
    except ValueError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    lines = ["| model | bits per byte |", "|---|---|"]
    lines += [f"| {name} | {bits:.3f} |" for name, bits in found["bits_per_byte"].items()]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    console.print("\n".join(lines), markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sys.exit(main())
