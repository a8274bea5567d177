"""The tables and the plot of `experiments/moe_lm.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.sparsity_law import as_law

COLORS = ("#1d4ed8", "#c2410c", "#737373", "#15803d", "#7e22ce")


def write_report(out: Path, found: dict[str, Any]) -> str:
    """Write table.md and moe_lm.png into `out`; returns the tables.

    Args:
        out: Directory, made before.
        found: summary.json of the experiment; parts may be missing.
    """
    made = {"compare": compared, "upcycle": upcycled, "prune": pruned, "law": laws}
    parts = ["\n".join(rows(found[name])) for name, rows in made.items() if name in found]
    tables = "\n\n".join(parts) + "\n"
    (out / "table.md").write_text(tables)
    plot(out / "moe_lm.png", found)
    return tables


def compared(found: dict[str, Any]) -> list[str]:
    """Quality beside what training and serving cost."""
    lines = [
        "| model | bits per byte | parameters | training FLOPs a byte | step, ms | "
        "bytes/s served, 1 text | 16 texts |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {name} | {several(x['bits_per_byte'])} | {x['parameters']:,} | {x['flops']:,.0f} | "
        f"{x['step_ms']:.1f} | {x['tokens_per_second_1']:,.0f} | {x['tokens_per_second_16']:,.0f} |"
        for name, x in found.items()
    ]


def upcycled(found: dict[str, Any]) -> list[str]:
    """What became of the dense model with equal extra FLOPs."""
    lines = [
        f"Before: {several(found['before'])} bits per byte.",
        "",
        "| what goes on | steps | extra FLOPs | parameters | bits per byte |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {x['steps']} | {x['flops']:.2e} | {x['parameters']:,} | "
        f"{several(x['bits_per_byte'])} |"
        for name, x in found["arms"].items()
    ]
    dense, experts = found["costs"]["dense"], found["costs"]["upcycled"]
    shown = ", ".join(
        f"{title} {dense[key]:,.0f} dense, {experts[key]:,.0f} upcycled"
        for title, key in (
            ("train step, ms:", "step_ms"),
            ("bytes/s served, 1 text:", "tokens_per_second_1"),
            ("16 texts:", "tokens_per_second_16"),
        )
    )
    return [*lines, "", shown[0].upper() + shown[1:] + "."]


def pruned(found: dict[str, Any]) -> list[str]:
    """Bits per byte by experts left."""
    counts = found["experts"]
    lines = [
        f"| experts kept by | {' | '.join(map(str, counts))} |",
        "|---|" + "---|" * len(counts),
    ]
    return lines + [
        f"| {way} | {' | '.join(f'{x:.3f}' for x in bits)} |" for way, bits in found["bits"].items()
    ]


def laws(found: dict[str, Any]) -> list[str]:
    """The grid at its last D, and the fitted laws."""
    points, last = found["points"], max(p["D"] for p in found["points"])
    experts = sorted({p["experts"] for p in points})
    lines = [
        f"| bits per byte after {last:,} bytes | " + " | ".join(f"E = {e}" for e in experts) + " |",
        "|---|" + "---|" * len(experts),
    ]
    for width in sorted({p["width"] for p in points}):
        row = {p["experts"]: p for p in points if p["width"] == width and p["D"] == last}
        shown = " | ".join(f"{row[e]['loss'] / np.log(2):.3f}" for e in experts)
        lines.append(f"| width {width} | {shown} |")
    lines += [
        "",
        "| law, in nats | error of log L | error where E is largest, fitted without | found |",
        "|---|---|---|---|",
    ]
    for name, fit in found["fits"].items():
        terms = []
        for names, scale, powers in zip(fit["terms"], fit["scales"], fit["powers"], strict=True):
            factors = (f"({n})^{-p:.2f}" for n, p in zip(names, powers, strict=True))
            terms.append(" ".join([f"{scale:.3g}", *factors]))
        lines.append(
            f"| {name} | {fit['error']:.4f} | {fit['foretold']:.4f} | {' + '.join(terms)} |"
        )
    return lines


def several(values: list[float]) -> str:
    """The mean, and each."""
    each = f" ({', '.join(f'{x:.3f}' for x in values)})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{each}"


def plot(path: Path, found: dict[str, Any]) -> None:
    """A panel for each part, two for the law; a missing part is left empty."""
    figure = Figure(figsize=(13, 7.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    panels = (
        ("compare", _learning),
        ("compare", _serving),
        ("upcycle", _going_on),
        ("prune", _pruning),
        ("law", _sparsity),
        ("law", _fit),
    )
    for (name, draw), ax in zip(panels, axes.flat, strict=True):
        if name in found:
            draw(ax, found[name])
        else:
            ax.set_title(f"{name}: not run")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e5e5", linewidth=0.7)
        ax.set_axisbelow(True)
    figure.savefig(path)


def _learning(ax: Any, found: dict[str, Any]) -> None:
    for (name, x), color in zip(found.items(), COLORS, strict=False):
        for seed, marks in enumerate(x["marks"]):
            label = name if seed == 0 else None
            ax.plot(*zip(*marks, strict=True), "o-", ms=3, lw=1, color=color, label=label)
    ax.set(title="from scratch", xlabel="step", ylabel="bits per byte, held out")
    ax.legend(frameon=False, fontsize=8)


def _serving(ax: Any, found: dict[str, Any]) -> None:
    for (name, x), color in zip(found.items(), COLORS, strict=False):
        bits = np.mean(x["bits_per_byte"])
        for batch, marker in ((1, "o"), (16, "s")):
            rate = x[f"tokens_per_second_{batch}"]
            label = f"{name}, {batch} text{'s' if batch > 1 else ''}"
            ax.plot([rate], [bits], marker, color=color, ms=6, label=label)
    ax.set(title="quality and serving", xlabel="bytes/s served", ylabel="bits per byte, held out")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.margins(0.15)
    ax.legend(frameon=False, fontsize=7)


def _going_on(ax: Any, found: dict[str, Any]) -> None:
    for (name, x), color in zip(found["arms"].items(), COLORS, strict=False):
        for seed, marks in enumerate(x["marks"]):
            work = [step / x["steps"] * x["flops"] for step, _ in marks]
            bits = [value for _, value in marks]
            if not name.endswith("scratch"):
                work, bits = [0.0, *work], [found["before"][seed], *bits]
            label = name if seed == 0 else None
            ax.plot(work, bits, "o-", ms=3, lw=1, color=color, label=label)
    ax.set(title="from a dense model", xlabel="extra training FLOPs")
    ax.set_ylabel("bits per byte, held out")
    ax.legend(frameon=False, fontsize=8)


def _pruning(ax: Any, found: dict[str, Any]) -> None:
    for (way, bits), color in zip(found["bits"].items(), COLORS, strict=False):
        ax.plot(found["experts"], bits, "o-", ms=3, lw=1.2, color=color, label=way)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set(title="pruned, not trained again", xlabel="experts a layer")
    ax.set_ylabel("bits per byte, held out")
    ax.invert_xaxis()
    ax.legend(frameon=False, fontsize=8)


def _sparsity(ax: Any, found: dict[str, Any]) -> None:
    points, last = found["points"], max(p["D"] for p in found["points"])
    law = as_law(found["fits"]["sparsity"]) if "sparsity" in found["fits"] else None
    for width, color in zip(sorted({p["width"] for p in points}), COLORS, strict=False):
        row = [p for p in points if p["width"] == width and p["D"] == last]
        experts = np.array([p["experts"] for p in row], float)
        label = f"width {width}"
        ax.plot(experts, [p["loss"] for p in row], "o", ms=4, color=color, label=label)
        if law is not None:
            # Parameters are linear in the number of experts.
            dense = np.linspace(experts.min(), experts.max(), 60)
            size = np.interp(dense, experts, [p["N"] for p in row])
            idle = np.interp(dense, experts, [1 / p["1-S"] for p in row])
            ax.plot(dense, law({"N": size, "D": np.full(60, last), "1-S": 1 / idle}), color=color)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set(title=f"equal FLOPs, {last:,} bytes", xlabel="experts, two a token")
    ax.set_ylabel("nats per byte, held out")
    ax.legend(frameon=False, fontsize=8)


def _fit(ax: Any, found: dict[str, Any]) -> None:
    points = found["points"]
    loss = np.array([p["loss"] for p in points])
    for (name, fit), color in zip(found["fits"].items(), COLORS, strict=False):
        size = "active" if name.startswith("active") else "N"
        data = {"N": np.array([p[size] for p in points], float)}
        data |= {x: np.array([p[x] for p in points], float) for x in ("D", "1-S")}
        ax.plot(loss, as_law(fit)(data), "o", ms=3, alpha=0.7, color=color, label=name)
    ends = [loss.min(), loss.max()]
    ax.plot(ends, ends, color="#a3a3a3", lw=0.9)
    ax.set(title="laws", xlabel="nats per byte, measured", ylabel="nats per byte, by the law")
    if found["fits"]:
        ax.legend(frameon=False, fontsize=8)
