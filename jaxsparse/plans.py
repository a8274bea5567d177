"""Which leaf is pruned how far: `uniform` and `erk`, from shapes alone, and the plan they make."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse.patterns import NM, Pattern, Unstructured, kept_units, units

Tree = Any
Where = str | Callable[[str, Any], bool]
Counts = list[jax.Array | int]
_DENSE_PART = re.compile(r"embed|^wte$|^wpe$|norm(_?\d+)?$")
_DENSE_NAME = ("bias", "scale", "gamma", "beta")


def check_sparsity(sparsity: float, what: str) -> None:
    """Raise a ValueError unless a sparsity lies in [0, 1)."""
    if isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(
            f"{what} is the fraction of weights removed and must lie in [0, 1); got {sparsity}. "
            "For 90 % write 0.9."
        )


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf is pruned. Static: not a pytree.

    Attributes:
        pattern: Structure of the mask.
        sparsity: Fraction removed, in [0, 1); 0.0 leaves the leaf dense. A leaf with an N:M pattern
            has 1 - n/m and nothing else.

    Example:
        >>> import jaxsparse as jsp
        >>> jsp.LeafPlan(jsp.NM(2, 4), 0.9).sparsity
        0.5
    """

    pattern: Pattern
    sparsity: float

    def __post_init__(self):
        check_sparsity(self.sparsity, "sparsity")
        if isinstance(self.pattern, NM) and self.sparsity:
            object.__setattr__(self, "sparsity", 1 - self.pattern.n / self.pattern.m)

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return 1 - self.sparsity


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a distribution decided for every leaf, in flatten order. Prints as a table.

    Attributes:
        paths: Path of each leaf.
        shapes: Shape of each leaf.
        leaves: `LeafPlan` of each leaf.
        pooled: Whether an allocator may move the density of a leaf.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params = {"up": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
        >>> print(jsp.uniform(0.75)(params))
        leaf         shape       pattern  sparsity   kept
        ---------  -------  ------------  --------  -----
        up/bias        (4)         dense         0    4/4
        up/kernel  (8 x 4)  Unstructured      0.75   8/32
        total                             0.666667  12/36
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    leaves: tuple[LeafPlan, ...]
    pooled: tuple[bool, ...]

    def __getitem__(self, path: str) -> LeafPlan:
        return self.leaves[self.paths.index(path)]

    def kept(self, i: int) -> int:
        """Weights that leaf i keeps."""
        leaf, size = self.leaves[i], math.prod(self.shapes[i])
        if not leaf.sparsity:
            return size
        group = units(leaf.pattern, self.shapes[i])
        return size * int(kept_units(leaf.density, group)) // group if group else 0

    def __str__(self) -> str:
        rows = []
        for i, (path, shape, leaf) in enumerate(
            zip(self.paths, self.shapes, self.leaves, strict=True)
        ):
            pattern = re.sub(r"\(ndim=2\)|, ndim=2|shape=", "", repr(leaf.pattern))
            rows.append(
                [
                    path,
                    "(" + " x ".join(map(str, shape)) + ")",
                    (pattern if leaf.sparsity else "dense"),
                    f"{leaf.sparsity:.6g}",
                    f"{self.kept(i):,}/{math.prod(shape):,}",
                ]
            )
        total = sum(math.prod(shape) for shape in self.shapes)
        kept = sum(self.kept(i) for i in range(len(self.paths)))
        share = f"{1 - kept / total:.6g}" if total else "0"
        rows.append(["total", "", "", share, f"{kept:,}/{total:,}"])
        return _tree.text_table(["leaf", "shape", "pattern", "sparsity", "kept"], rows)


class Allocate(Protocol):
    """Kept units per group of each leaf, from scores: one int32 per leading slice."""

    def __call__(self, scores: list[Any], plan: Plan, share: Any) -> Counts:
        """At `share` of the final sparsity."""
        ...


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Parameters -> `Plan`; made by `uniform`, `erk`, `global_`, `lamp`.

    Any function from parameters to a `Plan` can stand in its place.

    Attributes:
        sparsity: Target for the leaves that are not overridden.
        pattern: Their pattern.
        where: Which leaves are pruned: glob, predicate `(path, leaf) -> bool`, or None.
        overrides: Glob or predicate -> sparsity or `LeafPlan`; the first that matches holds.
        solve: Slice shapes and copies of the leaves -> densities; None = the same for all.
        allocate: For allocators: moves densities between leaves by their scores.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.uniform(0.9)({"w": jnp.ones((4, 4))})["w"].sparsity
        0.9
    """

    sparsity: float
    pattern: Pattern
    where: Where | None
    overrides: Mapping[Where, float | LeafPlan]
    solve: Callable[[list[tuple[tuple[int, ...], int]]], list[float]] | None = None
    allocate: Allocate | None = None

    def __post_init__(self):
        check_sparsity(self.sparsity, "sparsity")
        for rule, value in self.overrides.items():
            if not isinstance(value, LeafPlan):
                check_sparsity(value, f"overrides: the sparsity for {rule!r}")

    def __call__(self, params: Tree) -> Plan:
        """The plan for a tree of parameters; errors name the leaf."""
        paths = _tree.paths(params)
        arrays = jax.tree.leaves(params)
        self._check_rules(paths, arrays)
        leaves: list[LeafPlan] = []
        free: list[int] = []
        for i, (path, leaf) in enumerate(zip(paths, arrays, strict=True)):
            chosen, fixed = self._leaf_plan(path, leaf)
            leaves.append(chosen)
            if chosen.sparsity and not fixed and not isinstance(chosen.pattern, NM):
                free.append(i)
        shapes = [tuple(jnp.shape(leaf)) for leaf in arrays]
        if self.solve and free:
            ndim = getattr(self.pattern, "ndim", 2)
            matrices = [(shapes[i][-ndim:], math.prod(shapes[i][:-ndim])) for i in free]
            for i, density in zip(free, self.solve(matrices), strict=True):
                leaves[i] = LeafPlan(self.pattern, 1 - density)
        for path, shape, leaf in zip(paths, shapes, leaves, strict=True):
            if leaf.sparsity:
                _check_pattern(path, shape, leaf.pattern)
        pooled = tuple(i in free for i in range(len(leaves)))
        return Plan(tuple(paths), tuple(shapes), tuple(leaves), pooled)

    def _leaf_plan(self, path: str, leaf: Any) -> tuple[LeafPlan, bool]:
        """The plan of a leaf, and whether an override set it."""
        dense = LeafPlan(self.pattern, 0.0)
        chosen, fixed = dense, False
        for rule, value in self.overrides.items():
            if _tree.matches(rule, path, leaf):
                chosen = value if isinstance(value, LeafPlan) else LeafPlan(self.pattern, value)
                fixed = True
                break
        else:
            rule = prunable if self.where is None else self.where
            if jnp.ndim(leaf) >= 2 and _tree.matches(rule, path, leaf):
                chosen = LeafPlan(self.pattern, self.sparsity)
        if chosen.sparsity and not _tree.is_float(leaf):
            raise TypeError(
                f"{path} has dtype {_tree.dtype_of(leaf)}: only real floating-point leaves can be "
                "pruned. Exclude it with where= or overrides={...: 0.0}."
            )
        return chosen, fixed

    def _check_rules(self, paths: list[str], arrays: list[Any]) -> None:
        """Every glob and predicate must select something."""
        rules = [("overrides", rule) for rule in self.overrides]
        if self.where is not None:
            rules.append(("where", self.where))
        for argument, rule in rules:
            found = any(_tree.matches(rule, p, x) for p, x in zip(paths, arrays, strict=True))
            if paths and not found:
                raise _tree.unmatched(rule, paths, argument)


def _check_pattern(path: str, shape: tuple[int, ...], pattern: Pattern) -> None:
    try:
        jax.eval_shape(pattern.gather, jax.ShapeDtypeStruct(shape, jnp.float32))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def prunable(path: str, leaf: Any) -> bool:
    """The default of `where=`: matrices that are no embedding, norm or bias.

    A leaf of two or more axes, of a type that is not integer, whose path has no part that contains
    `embed` or ends in `norm` and whose name is not `bias` or `scale` (so that the biases and norms
    of scanned layers, `[layers, width]`, stay dense too).

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> [jsp.prunable(p, jnp.ones((4, 4))) for p in ("up/kernel", "embed/table", "norm/scale")]
        [True, False, False]
    """
    parts = path.lower().split("/")
    named_dense = parts[-1] in _DENSE_NAME or any(_DENSE_PART.search(part) for part in parts)
    inexact = jnp.issubdtype(_tree.dtype_of(leaf), jnp.inexact)
    return jnp.ndim(leaf) >= 2 and inexact and not named_dense


def uniform(
    sparsity: float,
    pattern: Pattern = Unstructured(),
    where: Where | None = None,
    overrides: Mapping[Where, float | LeafPlan] | None = None,
) -> Distribution:
    """The same sparsity for every pruned leaf.

    Args:
        sparsity: Fraction removed, in [0, 1).
        pattern: Structure of the masks.
        where: Which leaves: a glob over the path (`"*/kernel"`) or `(path, leaf) -> bool`. Default:
            `jsp.prunable`, every matrix but embeddings and norms. Leaves with fewer than two axes
            stay dense unless an override names them.
        overrides: Glob or predicate -> sparsity or `LeafPlan`, the first match holds; 0.0 = dense.

    Returns:
        A distribution: parameters -> `Plan`.

    Raises:
        ValueError: If a sparsity lies outside [0, 1); on use, if a glob or predicate selects no
            leaf or a shape does not fit its pattern.
        TypeError: On use, if a leaf to be pruned is not real floating-point.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params = {"up": jnp.ones((8, 8)), "head": jnp.ones((8, 8))}
        >>> plan = jsp.uniform(0.9, overrides={"head*": 0.5})(params)
        >>> plan["up"].sparsity, plan["head"].sparsity
        (0.9, 0.5)
    """
    return Distribution(sparsity, pattern, where, dict(overrides or {}))


def erk(
    sparsity: float,
    pattern: Pattern = Unstructured(),
    where: Where | None = None,
    overrides: Mapping[Where, float | LeafPlan] | None = None,
) -> Distribution:
    """Erdos-Renyi-kernel densities: small layers are kept denser than large ones.

    density_l = eps * (sum of the dimensions of a matrix) / (their product), at most 1, with eps
    such that the pruned leaves together keep 1 - sparsity. Overridden leaves and N:M leaves are set
    apart and do not count; leading stacked axes are copies of the matrix.

    Args:
        sparsity: Fraction removed of all leaves that take part, in [0, 1).
        pattern: As in `uniform`.
        where: As in `uniform`.
        overrides: As in `uniform`.

    Returns:
        A distribution: parameters -> `Plan`.

    Raises:
        ValueError: As in `uniform`.
        TypeError: As in `uniform`.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> plan = jsp.erk(0.8)({"a": jnp.ones((64, 64)), "b": jnp.ones((16, 16))})
        >>> round(plan["a"].sparsity, 2), round(plan["b"].sparsity, 2)
        (0.83, 0.32)

    References: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134; Mocanu et al., 2018,
    arXiv:1707.04780.
    """

    def solve(matrices: list[tuple[tuple[int, ...], int]]) -> list[float]:
        return _erk_densities(matrices, 1 - sparsity)

    return Distribution(sparsity, pattern, where, dict(overrides or {}), solve=solve)


def _erk_densities(matrices: Sequence[tuple[tuple[int, ...], int]], density: float) -> list[float]:
    sizes = [math.prod(shape) * copies for shape, copies in matrices]
    raw = [sum(shape) / math.prod(shape) if math.prod(shape) else 1.0 for shape, _ in matrices]
    dense: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        weight = sum(
            r * n for i, (r, n) in enumerate(zip(raw, sizes, strict=True)) if i not in dense
        )
        eps = budget / weight if weight else 0.0
        full = {i for i, r in enumerate(raw) if i not in dense and eps * r >= 1}
        if not full:
            return [1.0 if i in dense else eps * r for i, r in enumerate(raw)]
        dense |= full
