"""The table and the plot of `experiments/long_context.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {"dense": "#1d4ed8", "window": "#737373", "s2": "#15803d", "nsa": "#c2410c"}


def write_report(out: Path, found: dict[str, Any]) -> str:
    """Write table.md and long_context.png into `out`; returns the table.

    Args:
        out: directory, made before.
        found: summary.json of the experiment.
    """
    table = "\n".join(rows(found)) + "\n"
    (out / "table.md").write_text(table)
    plot(out / "long_context.png", found)
    return table


def quality(found: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Recall and bits_per_byte of every arm, one number a seed."""
    measures = {"recall": "recall", "text": "bits_per_byte"}
    return {
        arm: {
            measure: np.array([run[measure] for run in found[task][arm]])
            for task, measure in measures.items()
        }
        for arm in found["costs"]
    }


def rows(found: dict[str, Any]) -> list[str]:
    """A Markdown table, a row a kind of attention."""
    lines = [
        "| attention | recall | bits per byte of text | attention FLOPs a token | share of dense | "
        "all FLOPs, share of dense | step, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = quality(found)
    for arm, cost in found["costs"].items():
        whole = cost["flops"] / found["costs"].get("dense", cost)["flops"]
        shown = [
            "{:.3f} ({})".format(x.mean(), ", ".join(f"{y:.3f}" for y in x))
            for x in measured[arm].values()
        ]
        lines.append(
            f"| {arm} | {' | '.join(shown)} | {cost['attention_flops']:,.0f} | "
            f"{cost['density']:.3f} | {whole:.2f} | {cost['step_ms']:.0f} |"
        )
    return lines


def plot(path: Path, found: dict[str, Any]) -> None:
    """Recall over distance; recall and text over attention FLOPs; recall over step time."""
    figure = Figure(figsize=(12, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    far, share, text, time = figure.subplots(1, 4)
    context, measured = found["context"], quality(found)
    for arm, cost in found["costs"].items():
        color = COLORS[arm]
        bins = [
            [np.nan if x is None else x for x in run["by_distance"]] for run in found["recall"][arm]
        ]
        centres = (np.arange(len(bins[0])) + 0.5) * context / len(bins[0])
        far.plot(centres, np.mean(bins, axis=0), "o-", ms=3, color=color, label=arm)
        for axes, x, name in (
            (share, cost["density"], "recall"),
            (text, cost["density"], "bits_per_byte"),
            (time, cost["step_ms"], "recall"),
        ):
            values = measured[arm][name]
            axes.plot([x] * len(values), values, "o", color=color, ms=5, alpha=0.5)
            axes.annotate(
                arm, (x, values.mean()), xytext=(7, -3), textcoords="offset points", color=color
            )
    far.axhline(found["chance"], color="#a3a3a3", linestyle=(0, (4, 3)), linewidth=0.9)
    far.legend(frameon=False, fontsize=8)
    far.set(xlabel="tokens between query and record", ylabel="recall", ylim=(-0.03, 1.05))
    share.set(xlabel="attention FLOPs, share of dense", ylabel="recall", ylim=(-0.03, 1.05))
    text.set(xlabel="attention FLOPs, share of dense", ylabel="bits per byte of text")
    time.set(xlabel="train step, ms", ylabel="recall", ylim=(-0.03, 1.05))
    for axes in (share, text):
        axes.set_xlim(0, 1.2)
    time.set_xlim(0, 1.25 * max(cost["step_ms"] for cost in found["costs"].values()))
    for axes in (far, share, text, time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
        axes.set_axisbelow(True)
    figure.savefig(path)
