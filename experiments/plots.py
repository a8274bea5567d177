"""Plots of a run as PNG: the loss, and what the masks did layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#c2410c", "#1d4ed8")  # sparse, dense


def plot_loss(
    path: Path, runs: dict[str, list[dict[str, Any]]], baselines: dict[str, float]
) -> None:
    """Bits per byte over the steps: batches (smoothed over the raw line) and held-out text."""
    figure = Figure(figsize=(8, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    lowest, last = math.inf, 1
    for (name, records), color in zip(runs.items(), COLORS, strict=False):
        steps = [record["step"] for record in records]
        bits = np.array([record["loss"] for record in records]) / math.log(2)
        marks = [
            (r["step"], r["valid_bits_per_byte"]) for r in records if "valid_bits_per_byte" in r
        ]
        axes.plot(steps, bits, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth(bits), color=color, linewidth=1.6, label=f"{name}, training")
        axes.plot(
            *zip(*marks, strict=True),
            "o",
            color=color,
            ms=5,
            mec="white",
            label=f"{name}, held out",
        )
        lowest = min(lowest, bits.min(), *(bits for _, bits in marks))
        last = max(last, steps[-1])
    for name, bits in baselines.items():
        axes.axhline(bits, color="#737373", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {bits:.2f}",
            (1, bits),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color="#525252",
        )
    lowest = min(lowest, *baselines.values()) if baselines else lowest
    axes.set(
        xlabel="step", ylabel="bits per byte", xlim=(0, last), ylim=(max(0, lowest - 0.25), None)
    )
    axes.set_ylim(top=min(axes.get_ylim()[1], 6.0))
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    _finish(figure, axes)
    figure.savefig(path)


def plot_masks(path: Path, records: list[dict[str, Any]]) -> None:
    """Final sparsity of each matrix in each layer, and churn over the steps by layer and matrix."""
    marks = [record for record in records if "sparsity" in record]
    final = marks[-1]["sparsity"]
    kinds = [name.removeprefix("layers/").removesuffix("/kernel") for name in final]
    table = np.array(list(final.values()))  # [matrices, L]
    moves = [r for r in marks if r["step"] > 1]
    steps = [record["step"] for record in moves]
    churn = np.array([list(r["churn"].values()) for r in moves]).reshape(len(moves), *table.shape)

    figure = Figure(figsize=(12, 4.2), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    image = left.imshow(table, cmap="viridis", vmin=min(table.min(), 0.5), vmax=1, aspect="auto")
    left.set_yticks(range(len(kinds)), kinds)
    ticks = range(0, table.shape[1], max(1, table.shape[1] // 8))
    left.set_xticks(ticks, [str(i) for i in ticks])
    left.set(xlabel="layer", title="sparsity at the end")
    if table.shape[1] <= 6:
        for (i, j), value in np.ndenumerate(table):
            color = "black" if image.norm(value) > 0.6 else "white"
            left.text(j, i, f"{value:.1%}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=left, format=lambda x, _: f"{x:.0%}")

    import matplotlib as mpl

    for axes, lines, labels, title in (
        (middle, churn.mean(axis=1), [f"layer {i}" for i in range(table.shape[1])], "layer"),
        (right, churn.mean(axis=2), kinds, "matrix"),
    ):
        colors = mpl.colormaps["viridis" if title == "layer" else "tab10"]
        for i, label in enumerate(labels):
            spread = i / max(len(labels) - 1, 1) * 0.85 if title == "layer" else i
            axes.plot(steps, lines[:, i], color=colors(spread), linewidth=1.4, label=label)
        axes.set(xlabel="step", title=f"churn in an update, by {title}", ylim=(0, None))
        axes.yaxis.set_major_formatter(lambda x, _: f"{round(100 * x, 2):g}%")
        if len(labels) <= 8:
            axes.legend(frameon=False, fontsize=8)
        _finish(figure, axes)
    figure.savefig(path)


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Exponential mean over about a fiftieth of the values, without bias at the start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return np.array(found)


def _finish(figure: Figure, axes: Any) -> None:
    FigureCanvasAgg(figure)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
