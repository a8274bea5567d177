"""A trained language model of experts with fewer and fewer of them, chosen or merged on some text.

References: Lasby et al., REAP the experts, 2025, arXiv:2510.13999; Chen et al., Task-specific
expert pruning for sparse mixture-of-experts, 2022, arXiv:2206.00277; Sarkar et al., Revisiting SMoE
language models by evaluating inefficiencies with task specific expert pruning, 2024,
arXiv:2409.01483.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsparse import moe
from models.moe import Config, MoETransformer
from pallas_kernels import grouped_ffn

AXES = {f"layers/moe/{name}": -3 for name in ("gate", "up", "down")}
AXES["layers/moe/router/kernel"] = -1
DRAWS = 3  # of random experts


def watch(model: MoETransformer, tokens: jax.Array) -> tuple[moe.Usage, jax.Array]:
    """What every expert does for tokens [B, T], leaves [L, E], and the logits [L, B T, E]."""
    x = model.embed.embedding.get_value()[tokens].astype(model.config.dtype)
    positions = jnp.arange(tokens.shape[1])
    graph, stacked = nnx.split(model.layers)
    seen, logits = [], []
    for number in range(model.config.layers):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=number: leaf[i], stacked))
        x = x + layer.attention(layer.attention_norm(x), positions)[0]
        normed, experts = layer.moe_norm(x), layer.moe
        rows = normed.reshape(-1, normed.shape[-1])
        gate, up, down = (w.get_value() for w in (experts.gate, experts.up, experts.down))

        def run(rows, sizes, gate=gate, up=up, down=down, activation=experts.activation):
            return grouped_ffn(rows, gate, up, down, sizes, activation=activation)

        seen.append(moe.usage(rows, experts.route(rows), experts.experts, run))
        weights = {name: value.get_value() for name, value in experts.router.items()}
        logits.append(experts.chooser.logits(weights, rows, gate))
        x = x + experts(normed)[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen), jnp.stack(logits)


def counts_of(experts: int) -> list[int]:
    """How many experts to keep: all, then about a quarter fewer each time, down to one."""
    found = [experts]
    while found[-1] > 1:
        found.append(max(1, min(found[-1] - 1, found[-1] * 3 // 4)))
    return found


def best(scores: jax.Array, count: int) -> jax.Array:
    """Bool [L, E]: the `count` largest of each layer, ties by index."""
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    return rank < count


def curve(config: Config, params: Any, tokens: jax.Array, measured: list[Any]) -> dict[str, Any]:
    """Bits per byte by way of choosing and number of experts a layer.

    Args:
        config: Of the model; its router `token_choice(chosen)`.
        params: Trained.
        tokens: int32 [B, T] on which experts are watched; not those that are measured on.
        measured: Windows of `text.windows`.

    Returns:
        {"experts": counts, "bits": {way: a number for each count}}.
    """
    model = MoETransformer(config, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    seen, logits = nnx.jit(watch)(model, tokens)
    counts, layers, experts = counts_of(config.experts), config.layers, config.experts
    evaluate = _evaluator(config, measured)

    def merged(count: int) -> tuple[Any, jax.Array]:
        groups = np.stack([moe.alike(layer, count) for layer in logits])
        new = moe.merge_experts(params, jnp.asarray(groups), experts, seen.hits, AXES)
        return new, jnp.broadcast_to(jnp.arange(experts) < count, (layers, experts))

    def chosen(scores: jax.Array) -> Callable[[int], tuple[Any, jax.Array]]:
        return lambda count: (params, best(scores, count))

    ways = {
        "saliency": [chosen(moe.expert_saliency(seen))],
        "proficiency": [chosen(moe.proficiency(seen))],
        "merged": [merged],
        "random": [
            chosen(jax.random.uniform(jax.random.key(draw), (layers, experts)))
            for draw in range(DRAWS)
        ],
    }
    bits = {
        way: [float(np.mean([evaluate(*make(count)) for make in makers])) for count in counts]
        for way, makers in ways.items()
    }
    return {"experts": counts, "bits": bits}


def _evaluator(config: Config, measured: list[Any]) -> Callable[[Any, jax.Array], float]:
    """(params, alive [L, E]) -> bits per byte; compiled once for all of them."""
    config = dataclasses.replace(config, router=moe.among(moe.token_choice(config.chosen)))
    graph, _, rest = nnx.split(MoETransformer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def nats(params, alive, tokens, weights):
        lives = jax.tree.map(lambda _: alive, rest)  # the state of the routers, and all there is
        logits, _ = nnx.merge(graph, params, lives)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (losses * weights).sum()

    def evaluate(params: Any, alive: jax.Array) -> float:
        total = sum(float(nats(params, alive, jnp.asarray(t), w)) for t, w in measured)
        return total / sum(float(w.sum()) for _, w in measured) / float(np.log(2))

    return evaluate
