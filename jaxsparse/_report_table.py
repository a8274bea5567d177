"""What a report looks like: one row a leaf, as text and as HTML."""

from __future__ import annotations

import dataclasses
import html

from jaxsparse import _tree

FASTER, ZEROS, MEMORY = "faster", "only zeros", "only memory"
UNMEASURED, DENSE = "unmeasured", "dense"


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf of a `Report`, or the total.

    Attributes:
        path: Path of the leaf.
        shape: Its shape, of a stored weight that of the dense one.
        pattern: Name of the pattern or the format, "" if not known.
        kept: Weights kept.
        size: Weights in all.
        flops_dense: Multiplications and additions of `x @ w` for one row x, dense.
        flops_sparse: The same for kept weights only, whether or not a device saves the others.
        bytes_dense: Bytes of the dense weight.
        bytes_sparse: Bytes of the kept values and a mask of one bit a weight; of a stored weight
            those of its arrays, spare slots and topology included.
        speed: "faster", "only zeros", "only memory", "unmeasured" or "dense", on the device of the
            report.

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
        notes = [
            "FLOPs and bytes are counted, not measured; bytes: kept values + 1 bit a weight; of a "
            "stored weight all its arrays."
        ]
        if ZEROS in speeds:
            notes.append(
                f"only zeros: measured on {self.device}, this mask does not make x @ w faster than "
                "dense; it saves no time by itself."
            )
        if MEMORY in speeds:
            notes.append(
                f"only memory: measured on {self.device}, x @ w is not faster than dense at this "
                "density and size of block; take larger blocks or fewer."
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
        colors = {
            FASTER: "#1a7f37",
            ZEROS: "#bc4c00",
            MEMORY: "#9a6700",
            UNMEASURED: "#6e7781",
            DENSE: "#6e7781",
        }

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
