"""What training and serving small language models cost in time, the models in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.arm import Arm
from experiments.moe_training import make_model
from models import transformer
from models.generate import generate

BATCHES = (1, 16)  # texts that are served at once


def costs(
    models: dict[str, transformer.Config], arms: dict[str, Arm], tokens: Any
) -> dict[str, dict[str, float]]:
    """The time of a train step, and bytes a second that `generate` adds to some texts.

    Args:
        models: By name.
        arms: Of `make_arm`, by name.
        tokens: int32 [B, T + 1] of a step.

    Returns:
        Of each model `step_ms`, and `tokens_per_second_1` and `_16` for so many texts at once.
    """
    states = {name: arm.init(0) for name, arm in arms.items()}

    def step(name: str) -> None:
        *states[name], loss = arms[name].step(*states[name], tokens)
        jax.block_until_ready((states[name], loss))

    seconds = best_seconds(models, step)
    found = {name: {"step_ms": 1e3 * value} for name, value in seconds.items()}
    made = {name: make_model(config, nnx.Rngs(0)) for name, config in models.items()}
    context = tokens.shape[1] - 1
    for batch in BATCHES:
        prompt = jnp.zeros((batch, context // 4), jnp.int32)

        def serve(name: str, prompt: jax.Array = prompt) -> None:
            key = jax.random.key(0)
            generate(made[name], prompt, context // 2, key=key, temperature=0).block_until_ready()

        for name, value in best_seconds(models, serve).items():
            found[name][f"tokens_per_second_{batch}"] = batch * (context // 2) / value
    return found


def best_seconds(
    names: Iterable[str], call: Callable[[str], None], rounds: int = 25
) -> dict[str, float]:
    """The shortest time of each; they take turns, so that other load meets all alike."""
    best = dict.fromkeys(names, math.inf)
    for turn in range(rounds + 1):
        for name in best:
            start = time.perf_counter()
            call(name)
            if turn:  # the first one compiles
                best[name] = min(best[name], time.perf_counter() - start)
    return best
