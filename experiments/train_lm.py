"""The main job: train a language model with sparse weights, and put it beside the dense one.

`make train`, or `python -m experiments.train_lm --help` for the options.
"""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.markup import escape

from experiments import table
from experiments.allocator import keep_freed_memory
from experiments.arm import Arm, make_arm
from experiments.baselines import all_baselines
from experiments.log import make_console, read_metrics
from experiments.loop import Interrupted, Trained, train, write_json
from experiments.options import Options, model_config, parse, pattern, target_sparsity
from experiments.plots import plot_loss, plot_masks
from experiments.text import Text, batches, load
from models.flops import parameter_count
from models.generate import generate

FILES = ("metrics.jsonl", "result.json", "summary.json", "table.txt", "sample.txt")
PLOTS = ("loss.png", "masks.png")
DIRECTORIES = ("checkpoints", "dense")


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    console = make_console()
    try:
        options = parse(arguments)
        text = load(options.model.data, context=model_config(options).context)
        arm = make_arm(options, options.sparse.algorithm)
        if options.output.fresh:
            forget(options.output.out)
        introduce(options, text, console)
        run(options, text, arm, console)
    except Interrupted as stop:
        console.print(
            f"Stopped after step {stop.step} of {options.training.steps}; a checkpoint is saved.\n"
            "The same command goes on from there.",
            highlight=False,
        )
        return 130
    except KeyboardInterrupt:
        console.print("\nStopped. The same command goes on from the last checkpoint.")
        return 130
    except (ValueError, FloatingPointError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    return 0


def introduce(options: Options, text: Text, console: Console) -> None:
    """Say in three lines what will be trained on what."""
    config, s = model_config(options), options.sparse
    masks = "none: every weight is trained"
    if s.algorithm != "dense":
        masks = (
            f"{s.algorithm}, {target_sparsity(s):.0%} sparsity in the matrices of the blocks "
            f"({s.distribution}, {pattern(s)})"
        )
    console.print(
        f"[bold]model[/]  {options.model.model}: {parameter_count(config) / 1e6:.2f}M parameters, "
        f"{config.layers} layers of width {config.width}, context {config.context} bytes\n"
        f"[bold]text[/]   {options.model.data.name}: {len(text.train) / 1e6:.2f} MB to learn, "
        f"{len(text.valid) / 1e6:.2f} MB held out ({len(text.held_out)} parts)\n"
        f"[bold]masks[/]  {masks}",
        highlight=False,
    )


def run(options: Options, text: Text, arm: Arm, console: Console) -> None:
    """Train, measure, and leave table, plots and sample; what is done already is not done again."""
    out = options.output.out
    summary = _read(out / "summary.json")
    with ThreadPoolExecutor(1) as pool:  # compressing a text while the train step compiles
        known = summary.get("baselines")
        baselines = None if known else pool.submit(all_baselines, text.train, text.valid)
        sparse = train(arm, options, text, out, console)
        summary["baselines"] = known or baselines.result()
    if sparse.resumed:
        console.print(f"{out} is finished: nothing to train. Anew: --fresh, or another --out.")
    other = make_arm(options, "dense")
    dense: Trained | None = None
    if arm.name != "dense" and (options.output.compare or (out / "dense/result.json").exists()):
        dense = train(other, options, text, out / "dense", console)

    if "memory" not in summary:
        console.print("measuring the time of a step, sparse and dense in turns")
        params, state = (dense.params, dense.state) if dense else other.init()
        arms = {"sparse": (arm, sparse.params, sparse.state), "dense": (other, params, state)}
        data = batches(text.train, seed=options.training.seed, **_shape(options))
        seconds = table.step_seconds(arms, data[0])
        summary["step_ms"] = {name: 1e3 * value for name, value in seconds.items()}
        summary["memory"] = {
            name: table.step_memory(arm, data[0]) for name, (arm, *_) in arms.items()
        }
        summary["device"] = jax.devices()[0].device_kind
    if "sample" not in summary:
        summary["sample"] = sample(arm, sparse, text)
    write_json(out / "summary.json", summary)
    report(options, arm, sparse, other, dense, summary, console)


def sample(arm: Arm, trained: Trained, text: Text, length: int = 400) -> str:
    """Text that the model adds to the first bytes of the held-out text; `|` stands between."""
    params = arm.view(trained.params, trained.state)
    prompt = text.valid[:64].astype(np.int32)[None]
    model = nnx.merge(arm.graph, params)
    out = generate(model, jnp.asarray(prompt), length, key=jax.random.key(0), temperature=0.7)
    read = [bytes(np.asarray(part, np.uint8)) for part in (out[0, :64], out[0, 64:])]
    return "|".join(part.decode(errors="replace") for part in read)


def report(
    options: Options,
    arm: Arm,
    sparse: Trained,
    other: Arm,
    dense: Trained | None,
    summary: dict[str, Any],
    console: Console,
) -> None:
    """Print the tables and write table.txt, sample.txt and the plots."""
    out = options.output.out
    records = {arm.name: read_metrics(out / "metrics.jsonl")}
    if dense:
        records["dense"] = read_metrics(out / "dense/metrics.jsonl")
    times, memory = summary["step_ms"], summary["memory"]
    a = table.facts(options, records[arm.name], arm)
    a |= sparse.result | {"step_ms": times["sparse"]} | memory["sparse"]
    b = table.facts(options, [], other) | {"step_ms": times["dense"]} | memory["dense"]
    b |= dense.result if dense else {}
    parts: list[Any] = ["", table.baselines_table(a, b, summary["baselines"])]
    if arm.name != "dense":
        lines = table.honest_lines(a, b, summary["device"])
        parts = ["", table.comparison(a, b), *lines, *parts]
    (out / "sample.txt").write_text(summary["sample"] + "\n")
    plot_loss(out / "loss.png", records, summary["baselines"])
    if arm.name != "dense":
        plot_masks(out / "masks.png", records[arm.name])
    with (out / "table.txt").open("w") as file:
        for target in (console, Console(file=file, width=100)):
            for part in parts:
                target.print(part, highlight=False)
    console.print(f"\n[bold]sample[/], after the | \n{escape(summary['sample'])}", highlight=False)
    made = ", ".join(name for name in (*FILES, *PLOTS) if (out / name).exists())
    console.print(f"\n{out}: {made}, checkpoints/", highlight=False, soft_wrap=True)


def _shape(options: Options) -> dict[str, int]:
    return {"context": model_config(options).context, "batch": options.training.batch}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def forget(out: Path) -> None:
    """Remove what this job makes, and nothing else."""
    for name in (*FILES, *PLOTS):
        (out / name).unlink(missing_ok=True)
    for name in DIRECTORIES:
        shutil.rmtree(out / name, ignore_errors=True)


if __name__ == "__main__":
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sys.exit(main())
