"""What a mask costs and what it really saves."""

from __future__ import annotations

import dataclasses
import functools
import html
import importlib.resources
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse._masks import kept_and_size
from jaxsparse.plans import Plan, prunable

Tree = Any
FASTER, ZEROS, UNMEASURED, DENSE = "faster", "only zeros", "unmeasured", "dense"


@functools.cache
def break_even() -> dict[str, Any]:
    """Device kind -> pattern -> density below which this pattern is faster than dense there.

    Measured by `experiments/bench_break_even.py`; 0 means that it never was.
    """
    text = importlib.resources.files("jaxsparse").joinpath("break_even.json").read_text()
    return json.loads(text)


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf of a `Report`, or the total.

    Attributes:
        path: Path of the leaf.
        shape: Its shape.
        pattern: Name of the pattern, "" if not known.
        kept: Weights kept.
        size: Weights in all.
        flops_dense: Multiplications and additions of `x @ w` for one row x, dense.
        flops_sparse: The same for kept weights only, whether or not a device saves the others.
        bytes_dense: Bytes of the weight as it is stored.
        bytes_sparse: Bytes of the kept values and a mask of one bit a weight.
        speed: "faster", "only zeros", "unmeasured" or "dense", on the device of the report.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params, masks = jsp.prune({"w": jnp.ones((8, 8))}, jsp.uniform(0.75))
        >>> jsp.report(params, masks).leaves[0].flops_sparse
        32
    """

    path: str
    shape: tuple[int, ...]
    pattern: str
    kept: int
    size: int
    flops_dense: int
    flops_sparse: int
    bytes_dense: int
    bytes_sparse: int
    speed: str

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.kept / self.size if self.size else 0.0

    def cells(self) -> list[str]:
        """The row of this leaf in the table."""
        return [
            self.path,
            "(" + " x ".join(map(str, self.shape)) + ")" if self.path != "total" else "",
            self.pattern,
            f"{self.kept:,}/{self.size:,}",
            f"{self.sparsity:.1%}",
            f"{_short(self.flops_dense)} -> {_short(self.flops_sparse)}",
            f"{_short(self.bytes_dense)} -> {_short(self.bytes_sparse)}",
            self.speed,
        ]


HEADER = ["leaf", "shape", "pattern", "kept", "sparsity", "FLOPs a row", "bytes", "speed"]


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `report` found: prints as a table, and as HTML in a notebook.

    Attributes:
        leaves: One `LeafReport` a leaf.
        total: Their sum.
        device: Kind of device the verdict on speed is for.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params, masks = jsp.prune({"w": jnp.ones((8, 8))}, jsp.uniform(0.75))
        >>> jsp.report(params, masks).total.kept
        16
    """

    leaves: tuple[LeafReport, ...]
    total: LeafReport
    device: str

    def _notes(self) -> list[str]:
        speeds = {leaf.speed for leaf in self.leaves}
        notes = ["FLOPs and bytes are counted, not measured; bytes: kept values + 1 bit a weight."]
        if ZEROS in speeds:
            notes.append(
                f"only zeros: measured on {self.device}, this mask does not make x @ w faster than "
                "dense; it saves no time by itself."
            )
        if FASTER in speeds:
            notes.append(f"faster: below the break-even density measured on {self.device}.")
        if UNMEASURED in speeds:
            notes.append(
                f"unmeasured: nobody has measured this pattern on {self.device}; run "
                "experiments/bench_break_even.py there."
            )
        return notes

    def __str__(self) -> str:
        rows = [leaf.cells() for leaf in (*self.leaves, self.total)]
        return "\n".join([_tree.text_table(HEADER, rows), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colors = {FASTER: "#1a7f37", ZEROS: "#bc4c00", UNMEASURED: "#6e7781", DENSE: "#6e7781"}

        def row(leaf: LeafReport) -> str:
            bar = (
                f"background:linear-gradient(90deg,rgba(31,119,180,.25) {leaf.sparsity:.1%},"
                f"transparent {leaf.sparsity:.1%})"
            )
            styles = ["text-align:left", "", "", "", bar, "", ""]
            styles.append(f"color:{colors.get(leaf.speed, 'inherit')}")
            weight = ";font-weight:600" if leaf is self.total else ""
            cells = zip(leaf.cells(), styles, strict=True)
            return "<tr>" + "".join(_cell("td", c, s + weight) for c, s in cells) + "</tr>"

        head = "".join(_cell("th", name, "") for name in HEADER)
        body = "".join(row(leaf) for leaf in (*self.leaves, self.total))
        notes = "<br>".join(html.escape(note) for note in self._notes())
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<div style='font-size:smaller'>{notes}</div>"
        )


def _cell(tag: str, text: str, style: str) -> str:
    return f'<{tag} style="white-space:nowrap;{style}">{html.escape(text)}</{tag}>'


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def report(
    params: Tree,
    masks: Tree,
    plan: Plan | Callable[[Tree], Plan] | None = None,
    *,
    device: str | None = None,
) -> Report:
    """Per leaf and in total: kept weights, FLOPs, bytes, and whether a device gains anything.

    Args:
        params: Parameters.
        masks: Mask tree of bools, e.g. `jsp.masks(state)`.
        plan: The plan or distribution that made the masks, which names the patterns. Without it
            masks count as unstructured.
        device: Kind of device (`jax.Device.device_kind`) to judge speed on; default: the first.

    Returns:
        A `Report`. FLOPs are those of `x @ w` for one row x: 2 a weight, 0 for embeddings and for
        leaves with fewer than two axes. Training takes three times as many.

    Raises:
        ValueError: If the masks do not fit the parameters; names the leaf.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params, masks = jsp.prune({"w": jnp.ones((8, 8))}, jsp.uniform(0.75))
        >>> print(str(jsp.report(params, masks, device="none such")).splitlines()[2])
        w      (8 x 8)           16/64     75.0%    128 -> 32  256 -> 72  unmeasured
    """
    kept, sizes = kept_and_size(masks, params)
    if plan is not None and not isinstance(plan, Plan):
        plan = plan(params)
    device = jax.devices()[0].device_kind if device is None else device
    table = break_even().get(device, {})
    leaves = []
    for i, (path, leaf, mask) in enumerate(
        zip(_tree.paths(params), jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    ):
        count, size = int(kept[i]), sizes[i]
        masked = jnp.ndim(mask) > 0
        bytes_dense = size * getattr(_tree.dtype_of(leaf), "itemsize", 0)
        flops = 2 * size if masked or prunable(path, leaf) else 0
        pattern = type(plan.leaves[i].pattern).__name__ if plan is not None and masked else ""
        speed = DENSE
        if masked:
            known = table.get(pattern or "Unstructured")
            density = count / size if size else 1.0
            speed = UNMEASURED if known is None else ZEROS
            if known is not None and density <= known["density"]:
                speed = FASTER
        leaves.append(
            LeafReport(
                path=path,
                shape=tuple(jnp.shape(leaf)),
                pattern=pattern,
                kept=count,
                size=size,
                flops_dense=flops,
                flops_sparse=flops * count // size if size else 0,
                bytes_dense=bytes_dense,
                bytes_sparse=(
                    bytes_dense * count // size + math.ceil(size / 8)
                    if masked and size
                    else bytes_dense
                ),
                speed=speed,
            )
        )

    def total(field: str) -> int:
        return sum(getattr(leaf, field) for leaf in leaves)

    numbers = ["kept", "size", "flops_dense", "flops_sparse", "bytes_dense", "bytes_sparse"]
    whole = LeafReport("total", (), "", speed="", **{name: total(name) for name in numbers})
    return Report(tuple(leaves), whole, device)
