"""The grid of small models of experts that `moe_lm.py` fits laws to, and those laws.

Reference: Abnar et al., Parameters vs FLOPs: Scaling laws for optimal sparsity for
mixture-of-experts language models, 2025, arXiv:2501.12370.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from experiments.power_law import CHINCHILLA, SPARSITY, Law, fit_law
from jaxsparse import moe
from models.moe import Config

CHOSEN = 2  # experts a token: of two experts none is idle, and sparsity is zero


@cache
def law_config(width: int, experts: int, context: int) -> Config:
    """A model of the grid: heads of width 16, experts as wide as the model, two a token."""
    heads = max(1, width // 16)
    return Config(
        width=width,
        layers=2,
        heads=heads,
        kv_heads=heads,
        head_width=16,
        hidden=width,
        experts=experts,
        chosen=CHOSEN,
        shared=0,
        context=context,
        router=moe.token_choice(CHOSEN),
    )


LAWS = {
    "sparsity": (SPARSITY, "N"),
    "all parameters": (CHINCHILLA, "N"),
    "active parameters": (CHINCHILLA, "active"),
}
"""Law -> its terms, and what it takes for N."""


def fits(points: list[dict[str, Any]], most: int, *, starts: int = 32) -> dict[str, Any]:
    """Each law on all points, and on those of fewer experts than `most` to foretell the others."""
    table = {name: np.array([p[name] for p in points], float) for name in points[0]}
    few, found = table["experts"] < most, {}
    for name, (terms, size) in LAWS.items():
        data = {"N": table[size], "D": table["D"], "1-S": table["1-S"]}
        needed = sum(1 + len(names) for names in terms)
        if len(points) < needed or few.sum() < needed:
            continue
        whole = fit_law(terms, data, table["loss"], starts=starts)
        some = {k: v[few] for k, v in data.items()}
        part = fit_law(terms, some, table["loss"][few], starts=starts)
        rest = {k: v[~few] for k, v in data.items()}
        found[name] = whole._asdict() | {"foretold": part.off(rest, table["loss"][~few])}
    return found


def as_law(fit: dict[str, Any]) -> Law:
    """A law of summary.json."""
    powers = tuple(map(tuple, fit["powers"]))
    return Law(tuple(map(tuple, fit["terms"])), tuple(fit["scales"]), powers, fit["error"])
