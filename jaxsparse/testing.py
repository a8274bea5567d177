"""Conformance checks, for users too: one call holds a new updater or pattern to its contract.

They raise an AssertionError that names the leaf. Use tiny parameters: what is checked does not
depend on size, and most of the time goes into compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _tree
from jaxsparse._masks import unpack_masks
from jaxsparse.patterns import Pattern, kept_units, make_mask, units
from jaxsparse.plans import Plan
from jaxsparse.training._sparsify import SparseState, masks, sparsify
from jaxsparse.training._updater import MaskUpdater

Tree = Any
NAN_AT, INF_AT = 2, 5  # steps of `check_updater` whose gradient is not finite


def top_units(pattern: Pattern, scores: Any, density: float) -> np.ndarray:
    """Kept units by a stable argsort of each group, in numpy: the oracle of `make_mask`.

    Example:
        >>> import numpy as np, jaxsparse as jsp
        >>> from jaxsparse.testing import top_units
        >>> top_units(jsp.NM(1, 2, axis=-1), np.array([[1.0, 2.0, 0.0, 0.0]]), 0.5)[0]
        array([[False,  True],
               [ True, False]])
    """
    gathered = np.asarray(pattern.gather(jnp.asarray(scores)))
    wide = np.int64 if gathered.dtype.kind in "bui" else np.float64
    axes = range(-len(pattern.axes), 0)
    last = np.moveaxis(gathered.astype(wide), pattern.axes, axes)
    flat = last.reshape(*last.shape[: last.ndim - len(pattern.axes)], -1)
    nan = np.isnan(flat) if wide is np.float64 else np.zeros(flat.shape, bool)
    best_first = np.argsort(np.where(nan, np.inf, -flat), axis=-1, kind="stable")
    # A NaN stands behind -inf although both sort as inf: move the NaNs to the end, in order.
    behind = np.argsort(np.take_along_axis(nan, best_first, -1), axis=-1, kind="stable")
    best_first = np.take_along_axis(best_first, behind, -1)
    keep = np.zeros(flat.shape, bool)
    count = round(density * flat.shape[-1])
    np.put_along_axis(keep, best_first[..., :count], True, -1)
    return np.moveaxis((keep & ~nan).reshape(last.shape), axes, pattern.axes)


def check_pattern(
    pattern: Pattern,
    shape: tuple[int, ...],
    *,
    dtype: Any = jnp.float32,
    densities: tuple[float, ...] = (0.0, 0.3, 0.5, 1.0),
) -> None:
    """Assert that a pattern keeps the contract of `make_mask`.

    It is hashable; its mask is bool, broadcasts to the weight, is the one of a stable argsort of
    the units (also with ties, infinities, -0.0 and NaN; unless the pattern has its own `keep`),
    keeps the exact count in every group, is the same for a traced density, and treats leading
    stacked axes slice by slice.

    Args:
        pattern: The pattern.
        shape: A shape that fits it, without stacked axes.
        dtype: Of the scores.
        densities: Densities to try.

    Raises:
        AssertionError: Says what does not hold, and at which density.

    Example:
        >>> import jaxsparse as jsp
        >>> from jaxsparse.testing import check_pattern
        >>> check_pattern(jsp.NM(2, 4), (8, 3))
    """
    _say(hash(pattern) == hash(pattern) and pattern == pattern, f"{pattern} must be hashable")
    rng = np.random.default_rng(0)
    stack = rng.integers(-3, 4, (2, *shape)).astype(np.float32) / 4
    if jnp.issubdtype(dtype, jnp.floating):
        odd = [np.nan, np.inf, -np.inf, -0.0][: stack.size]
        stack.reshape(-1)[rng.choice(stack.size, len(odd), replace=False)] = odd
    scores = jnp.asarray(stack, dtype)
    size = units(pattern, shape)
    traced = jax.jit(make_mask, static_argnums=0)
    for density in densities:
        what = f"{pattern} at density {density}"
        mask = make_mask(pattern, scores, density)
        _say(mask.dtype == jnp.bool_, f"{what}: the mask must be bool; got {mask.dtype}")
        broad = np.broadcast_to(mask, scores.shape)
        kept = np.asarray(pattern.gather(jnp.asarray(broad, jnp.float32))) > 0
        keep = kept if hasattr(pattern, "keep") else top_units(pattern, scores, density)
        _say(kept == keep, f"{what}: other units than a stable argsort keeps")
        again = pattern.scatter(jnp.asarray(keep), scores.shape)
        _say(
            np.broadcast_to(again, broad.shape) == broad,
            f"{what}: scatter does not undo gather",
        )
        valid = ~np.isnan(np.asarray(pattern.gather(scores)).astype(np.float64))
        most = valid.sum(pattern.axes)
        count = np.minimum(kept_units(density, size), most)
        _say(keep.sum(pattern.axes) == count, f"{what}: a group does not keep its count")
        _say(
            traced(pattern, scores, jnp.float32(density)) == mask,
            f"{what}: a traced density gives another mask",
        )
        for i in range(2):
            alone = make_mask(pattern, scores[i], density)
            _say(alone == mask[i], f"{what}: slice {i} of a stack differs from that slice alone")


def check_updater(
    updater: MaskUpdater,
    inner: optax.GradientTransformation,
    params: Tree,
    *,
    plan: Plan | None = None,
    moves: bool | None = None,
    steps: int = 9,
    packed: bool = False,
    wrap: Callable[[Any], Any] = lambda tx: tx,
    micro_steps: int = 1,
    floor: float = 0.0,
    forms: bool = True,
    jit: Callable[..., Any] = jax.jit,
    **extra: Any,
) -> None:
    """Assert that an updater keeps the contract of `sparsify` over some steps with one optimizer.

    Masks are bool, fit their weights and are the scalar True on dense leaves; weights and every
    parameter-shaped leaf of the inner state are exactly zero where the masks, or `kept`, say so;
    a gradient that is not finite changes nothing; the state keeps its structure, shapes and dtypes;
    packed masks and eager execution give the same.

    Args:
        updater: The algorithm.
        inner: An Optax optimizer.
        params: Small floating-point parameters, with a leaf of at least two axes.
        plan: If given, every group of the last masks keeps what it plans, exactly.
        moves: Whether masks must change (True), must not (False), or may (None).
        steps: Steps to take; the gradients of two of them are not finite.
        packed: Keep masks in bits.
        wrap: What stands around `sparsify`, e.g. `lambda tx: optax.MultiSteps(tx, 2)`.
        micro_steps: Updates that make up one step of what stands around.
        floor: Largest value that `inner` itself puts into state where gradient and state are zero:
            1e-30 for adafactor, which adds it to squared gradients.
        forms: Also compare packed with unpacked masks, bit for bit, and compiled with eager.
        jit: How to compile.
        **extra: Keyword arguments for `tx.update`.

    Raises:
        AssertionError: Names the leaf and the step.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> from jaxsparse.testing import check_updater
        >>> updater = jsp.static(jsp.uniform(0.5), score=jsp.magnitude)
        >>> check_updater(updater, optax.sgd(0.1), {"w": jnp.arange(8.0).reshape(2, 4)})
    """

    def build(packed: bool) -> tuple[Any, Callable[..., Any]]:
        tx = wrap(sparsify(inner, updater, packed=packed))

        def step(carry: Any, t: jax.Array) -> Any:
            params, state = carry
            old = unpacked(state)
            grads = gradients_at(updater.view(params, old), params, t // micro_steps)
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            new = unpacked(state)
            kept = updater.kept(old, old if updater.after_step else new)
            seen = (params, _inside(state)._replace(updater=new), kept, updates, masks(state))
            return (params, state), seen

        return tx, step

    def history(packed: bool) -> Any:
        tx, step = build(packed)
        state = tx.init(params)
        _same_types(jax.eval_shape(tx.init, params), state, "eval_shape(tx.init)")
        ts = jnp.arange(steps * micro_steps)
        _, seen = jit(lambda p, s: jax.lax.scan(step, (p, s), ts))(params, state)
        first = (params, _inside(state)._replace(updater=unpacked(state)), None, None, masks(state))
        whole = [jax.tree.map(lambda x, t=t: np.asarray(x)[t], seen) for t in range(len(ts))]
        return [jax.tree.map(np.asarray, first), *whole[micro_steps - 1 :: micro_steps]]

    seen = history(packed)
    for t in range(steps):
        _check_step(seen[t], seen[t + 1], t, floor)
    trees = [jax.tree.leaves(s[4]) for s in seen]
    last = trees[-1]
    changed = any(
        (a != b).any() for t in range(steps) for a, b in zip(*trees[t : t + 2], strict=True)
    )
    if moves is not None:
        _say(changed == moves, f"masks {'never move' if moves else 'move'} in {steps} steps")
    if plan is not None:
        _check_plan(plan, last)
    if not forms:
        return
    for t, (a, b) in enumerate(zip(seen, history(not packed), strict=True)):
        _same(a, b, f"packed and unpacked differ before step {t}")
    tx, step = build(packed)
    carry = (params, tx.init(params))
    for t in range(micro_steps):
        carry, eager = step(carry, jnp.asarray(t))
    _same(eager[4], seen[1][4], "eager masks differ from compiled ones")
    _close(eager[0], seen[1][0], "eager parameters differ from compiled ones")


def unpacked(state: Any) -> Any:
    """The updater's state inside an optimizer state, with masks as bools.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> from jaxsparse.testing import unpacked
        >>> tx = jsp.sparsify(optax.sgd(1.0), jsp.fixed([jnp.ones((8, 1), bool)]), packed=True)
        >>> unpacked(tx.init([jnp.ones((8, 1))])).masks[0].dtype
        dtype('bool')
    """
    inside = _inside(state).updater
    return inside._replace(masks=unpack_masks(inside.masks))


def gradients_at(view: Tree, params: Tree, t: jax.Array) -> Tree:
    """A gradient for step t, without a loss: not finite in one entry at steps 2 and 5.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.testing import NAN_AT, gradients_at
        >>> bool(jnp.isnan(gradients_at([jnp.ones(2)], [jnp.ones(2)], NAN_AT)[0]).any())
        True
    """
    bad = jnp.where(t == NAN_AT, jnp.nan, jnp.where(t == INF_AT, -jnp.inf, 0.0))
    leaves, treedef = jax.tree.flatten(view)
    grads = []
    for i, (v, w) in enumerate(zip(leaves, jax.tree.leaves(params), strict=True)):
        order = jnp.arange(v.size, dtype=jnp.float32).reshape(v.shape)
        g = v.astype(jnp.float32) / 8 + jnp.cos(order * 37 + 11 * t + i) + 0 * w.astype(jnp.float32)
        here = (order == v.size - 1) & (i == t % len(leaves))
        grads.append(jnp.where(here, g + bad, g).astype(w.dtype))
    return treedef.unflatten(grads)


def _inside(state: Any) -> SparseState:
    """The state of `sparsify` inside an optimizer state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparseState))
    return next(x for x in leaves if isinstance(x, SparseState))


def _check_step(before: Any, after: Any, t: int, floor: float) -> None:
    """The contract between two steps; each is (params, state, kept, updates, masks)."""
    old, state = before[1].updater, after[1].updater
    if t in (NAN_AT, INF_AT):
        _same(before[0], after[0], f"step {t}: a gradient that is not finite moved the weights")
        _same(before[1], after[1], f"step {t}: a gradient that is not finite changed the state")
        _same(jax.tree.map(np.zeros_like, after[3]), after[3], f"step {t}: the update is not zero")
        return
    dense = getattr(state, "dense_weights", False)
    rows = zip(*map(jax.tree.leaves, (after[0], after[2], old.masks, after[4])), strict=True)
    inner = [
        (_tree.path_str(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(after[1].inner)[0]
    ]
    names = _tree.paths(after[0])
    for path, (w, kept, was, mask) in zip(names, rows, strict=True):
        what = f"step {t}: {path}"
        _say(mask.dtype == bool, f"{what}: the mask is {mask.dtype}, not bool")
        _say(mask.ndim or mask, f"{what}: the mask of a dense leaf is the scalar True")
        fits = np.broadcast_shapes(mask.shape, w.shape) == w.shape
        _say(fits, f"{what}: a mask {mask.shape} does not broadcast to {w.shape}")
        _say(np.isfinite(w.astype(np.float32)), f"{what} is not finite")
        off = [np.broadcast_to(~np.asarray(m), w.shape) for m in (kept, mask, was)]
        for gone in off[: 1 if dense else 3]:
            _say(w[gone] == 0, f"{what}: {np.sum(w[gone] != 0)} weights are not zero off the mask")
        for name, leaf in inner:
            longest = max((p for p in names if f"/{name}".endswith(f"/{p}")), key=len, default="")
            if longest == path and leaf.shape == w.shape:
                _say(
                    np.abs(leaf[off[0]]) <= floor,
                    f"{what}: inner state {name} is not zero off the mask",
                )


def _check_plan(plan: Plan, masks: list[np.ndarray]) -> None:
    for path, shape, leaf, mask in zip(plan.paths, plan.shapes, plan.leaves, masks, strict=True):
        if not leaf.sparsity:
            _say(mask.ndim == 0, f"{path} is planned dense but has a mask {mask.shape}")
            continue
        kept = leaf.pattern.gather(jnp.asarray(np.broadcast_to(mask, shape), jnp.float32)) > 0
        want = kept_units(leaf.density, units(leaf.pattern, shape))
        got = np.asarray(kept).sum(leaf.pattern.axes)
        _say(got == want, f"{path} keeps {got} units a group; {want} are planned")


def _same_types(abstract: Any, tree: Any, what: str) -> None:
    _say(jax.tree.structure(abstract) == jax.tree.structure(tree), f"{what}: another structure")
    for path, a, b in zip(
        _tree.paths(tree), jax.tree.leaves(abstract), jax.tree.leaves(tree), strict=True
    ):
        same = (jnp.shape(a), _tree.dtype_of(a)) == (jnp.shape(b), _tree.dtype_of(b))
        _say(same, f"{what}: {path} has another shape or dtype")


def _same(a: Any, b: Any, what: str) -> None:
    """Bit for bit, but for the sign of zero."""
    for path, x, y in zip(_tree.paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        _say(np.shape(x) == np.shape(y), f"{what}: {path}, shape {np.shape(x)}, {np.shape(y)}")
        _say((x == y) | (x != x) & (y != y), f"{what}: {path}")


def _close(a: Any, b: Any, what: str) -> None:
    """Integers and bools the same, floats within four roundings of the largest entry."""
    for path, x, y in zip(_tree.paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        error = np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0)
        scale = np.abs(y.astype(np.float64)).max(initial=0)
        inexact = jnp.issubdtype(y.dtype, jnp.inexact)
        bound = 4 * float(jnp.finfo(y.dtype).eps) * scale if inexact else 0
        _say(error <= bound, f"{what}: {path}, by {error}")


def _say(holds: Any, message: str) -> None:
    if not np.all(holds):
        raise AssertionError(message)
