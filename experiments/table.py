"""The closing table: sparse against dense, in quality, size, work, time and memory."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.arm import Arm
from experiments.options import DENSE_GRADIENT, STORED, Options, model_config
from models.flops import parameter_shapes, training_flops


def step_seconds(arms: dict[str, tuple[Arm, Any, Any]], tokens: Any, rounds: int = 9) -> dict:
    """Median seconds of a quiet train step (no mask update) of each arm.

    The arms take turns, so that other load on the machine meets all of them alike. They work on
    copies of the given params and states.
    """
    tokens, times = jnp.asarray(tokens), {name: [] for name in arms}
    states = {
        name: jax.tree.map(jnp.copy, (params, state)) for name, (_, params, state) in arms.items()
    }
    for _ in range(rounds + 1):
        for name, (arm, _, _) in arms.items():
            start = time.perf_counter()
            *states[name], loss = arm.step(*states[name], tokens)
            jax.block_until_ready((states[name], loss))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def step_memory(arm: Arm, tokens: Any) -> dict[str, int]:
    """Bytes that a compiled step holds: parameters and optimizer, and what it needs on the way."""
    found = arm.step.lower(*jax.eval_shape(arm.init), jnp.asarray(tokens)).compile()
    memory = found.memory_analysis()
    held = memory.argument_size_in_bytes - np.asarray(tokens, np.int32).nbytes
    return {"held_bytes": held, "temporary_bytes": memory.temp_size_in_bytes}


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays; works on shapes from `jax.eval_shape`."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def kept_shares(record: dict[str, Any]) -> dict[str, float]:
    """Share of kept weights by path from a record of metrics.jsonl that has `sparsity`."""
    return {path: 1 - sum(layers) / len(layers) for path, layers in record["sparsity"].items()}


def run_flops(options: Options, records: list[dict[str, Any]], algorithm: str) -> float:
    """FLOPs of a whole run if absent weights cost nothing, from the sparsity in its records.

    An algorithm that needs the gradient of absent weights pays for the dense weight gradient (a
    third of the work) in the steps where it does.
    """
    config, steps = model_config(options), options.training.steps
    tokens = options.training.batch * config.context
    dense = sum(training_flops(config).values())
    marks = [record for record in records if "sparsity" in record]
    if not marks:
        return steps * tokens * dense
    share = DENSE_GRADIENT.get(algorithm, lambda _: 0.0)(options) / 3
    ends = [mark["step"] for mark in marks[1:]] + [steps + 1]
    total = (marks[0]["step"] - 1) * dense
    for mark, end in zip(marks, ends, strict=True):
        sparse = sum(training_flops(config, kept_shares(mark)).values())
        total += (end - mark["step"]) * (sparse + share * (dense - sparse))
    return total * tokens


def parameters(options: Options, records: list[dict[str, Any]]) -> tuple[int, int]:
    """(kept, all) parameters at the end."""
    sizes = {p: math.prod(shape) for p, shape in parameter_shapes(model_config(options)).items()}
    marks = [record for record in records if "sparsity" in record]
    kept = kept_shares(marks[-1]) if marks else {}
    return round(sum(kept.get(p, 1.0) * n for p, n in sizes.items())), sum(sizes.values())


def facts(options: Options, records: list[dict[str, Any]], arm: Arm) -> dict[str, Any]:
    """Size, work and memory of an arm: what is known without training it."""
    algorithm = arm.name if any("sparsity" in record for record in records) else "dense"
    _, state = jax.eval_shape(arm.init)
    kept, size = parameters(options, records)
    return {
        "name": arm.name,
        "kept": kept,
        "parameters": size,
        "flops": run_flops(options, records, algorithm),
        "optimizer_bytes": tree_bytes(state),
    }


def comparison(sparse: dict[str, Any], dense: dict[str, Any]) -> Table:
    """The table; what `dense` lacks says how to get it."""
    table = Table(title=f"{sparse['name']} against dense", title_justify="left")
    table.add_column("")
    for column in (sparse["name"], "dense", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(title: str, field: str, show: Any) -> None:
        a, b = sparse[field], dense.get(field)
        last = ("with --compare", "") if b is None else (show(b), f"{a / b:.3f}")
        table.add_row(title, show(a), *last)

    row("validation, bits per byte", "valid_bits_per_byte", "{:.3f}".format)
    row("validation loss, nats per byte", "valid_loss", "{:.3f}".format)
    row("kept parameters", "kept", "{:,}".format)
    row("training FLOPs, absent weights free", "flops", "{:.2e}".format)
    row("time of a quiet step, ms", "step_ms", "{:.0f}".format)
    row("optimizer memory, MB", "optimizer_bytes", lambda x: f"{x / 1e6:.2f}")
    row("parameters and optimizer, MB", "held_bytes", lambda x: f"{x / 1e6:.1f}")
    row("temporaries of a step, MB", "temporary_bytes", lambda x: f"{x / 1e6:.1f}")
    return table


def baselines_table(sparse: dict[str, Any], dense: dict[str, Any], others: dict) -> Table:
    """Bits per byte of everything that was measured on the held-out text, best last."""
    table = Table(title="bits per byte of the held-out text", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    found = dict(others)
    for arm in (sparse, dense):
        if "valid_bits_per_byte" in arm:
            found[f"this model, {arm['name']}"] = arm["valid_bits_per_byte"]
    for name, bits in sorted(found.items(), key=lambda item: -item[1]):
        style = "bold" if name.startswith("this model") else ""
        table.add_row(name, f"{bits:.3f}", style=style)
    return table


def honest_lines(sparse: dict[str, Any], dense: dict[str, Any], device: str) -> list[str]:
    """What the ratios in the table do and do not mean on this device."""
    ratio = sparse["step_ms"] / dense["step_ms"]
    memory = sparse["optimizer_bytes"] / dense["optimizer_bytes"]
    if sparse["name"] in STORED:
        held = sparse["held_bytes"] / dense["held_bytes"]
        return [
            f"Only stored blocks are multiplied, trained and kept in the optimizer: on this device "
            f"({device}) a quiet step takes {ratio:.2f} of the dense time, and parameters and "
            f"optimizer {held:.2f} of the dense memory."
        ]
    lines = [
        f"Masked weights are multiplied as zeros, so on this device ({device}) the FLOPs are saved "
        f"on paper only: a quiet step takes {ratio:.2f} of the dense time."
    ]
    if memory >= 1:
        lines.append(
            f"The optimizer keeps full moments, zero off the masks, and the masks at 1 bit a "
            f"weight: {memory:.2f} of the dense memory."
        )
    return lines
