"""`sparsify`: any Optax optimizer, under masks that may move."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _tree
from jaxsparse._masks import apply_leaf, is_hidden, pack_masks, unpack_masks
from jaxsparse.training._gate import all_finite, update_when
from jaxsparse.training._updater import MaskUpdater

Tree = Any


class SparseState(NamedTuple):
    """State of `sparsify`.

    Attributes:
        updater: State of the mask updater; `updater.masks` is the mask tree, in bits when packed.
        inner: State of the inner optimizer, zero off the masks.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> tx = jsp.sparsify(optax.sgd(0.1), jsp.static(jsp.uniform(0.5), score=jsp.magnitude))
        >>> tx.init({"w": jnp.array([[3.0, 1.0]])}).updater.masks["w"]
        Array([[ True, False]], dtype=bool)
    """

    updater: Any
    inner: optax.OptState


def sparsify(
    inner: optax.GradientTransformation, updater: MaskUpdater, *, packed: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Train with `inner` under the masks of `updater`.

    With `kept` = entries in the mask before and after, one update does this: the updater sees the
    dense gradient and moves its masks; gradients, parameters and parameter-shaped state are zeroed
    where not kept; `inner` updates; where not kept the update is minus the parameter. So after
    `optax.apply_updates` weights are exactly zero where nothing is kept, weights that leave vanish,
    and weights that come in start from zero with fresh moments. A gradient that is not finite
    changes nothing: not the masks, not the weights, not the state.

    Compute the loss with `updater.view(params, state.updater)`; except for `ste` and `sr_ste` that
    is the parameters themselves. Accumulate gradients outside, with
    `optax.MultiSteps(sparsify(...), k)`. Put what rescales updates (schedules, clipping) inside
    `inner`; `jsp.check` tells when it is not.

    Args:
        inner: Any Optax optimizer.
        updater: How masks begin and move: `static`, `fixed`, `gradual`, `set_`, `rigl`, ...
        packed: Keep masks at one bit a weight, for a little time in each step.

    Returns:
        A gradient transformation with the state `SparseState`; extra arguments of `update` reach
        the updater and `inner`, which also gets `masks`, those of the view.

    Raises:
        ValueError: If `params` is missing in `update`, if `sparsify` is nested, or if the
            parameters are `optax.LookaheadParams`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxsparse as jsp
        >>> rigl = jsp.rigl(jsp.uniform(0.5), key=jax.random.key(0), when=jsp.once(10))
        >>> tx = jsp.sparsify(optax.adam(1e-3), rigl)
        >>> params = {"w": jnp.ones((4, 4))}
        >>> updates, state = tx.update({"w": jnp.ones((4, 4))}, tx.init(params), params)
        >>> int((optax.apply_updates(params, updates)["w"] != 0).sum())
        8

    Cost: a pass over the gradients to see whether they are finite; masks of 1 byte a weight, 1 bit
    when packed. A step on which no mask is due copies nothing.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SparseState:
        _refuse_lookahead(params)
        state = updater.init(params)
        inner_state = inner.init(jax.tree.map(apply_leaf, params, updater.kept(state, state)))
        if _sparse_states(inner_state):
            raise ValueError(
                "sparsify is nested: its inner optimizer already contains a sparsify. Combine the "
                "plans in one updater (overrides=), or split leaves with optax.multi_transform."
            )
        masks = pack_masks(state.masks) if packed else state.masks
        return SparseState(state._replace(masks=masks), inner_state)

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, SparseState]:
        grads = updates
        if params is None:
            raise ValueError(
                "sparsify needs the parameters: call tx.update(grads, state, params), not "
                "tx.update(grads, state)."
            )
        stored = state.updater.masks
        old = state.updater._replace(masks=unpack_masks(stored))
        finite = all_finite(grads)
        new = old
        if not updater.after_step:
            new = updater.update(old, params, grads, finite=finite, **extra)
        kept = updater.kept(old, new)
        if updater.regularize is not None:
            grads, _ = updater.regularize(params, old, grads, None)

        def clear(x: Any, mask: jax.Array, w: Any) -> Any:
            if is_hidden(x) or jnp.shape(x) != jnp.shape(w):  # factored moments, placeholders
                return x
            return apply_leaf(x, mask)

        def step(inner_state: optax.OptState) -> tuple[Tree, optax.OptState]:
            cleared = optax.tree.map_params(
                inner, clear, inner_state, kept, params, is_leaf=is_hidden
            )
            updates, inner_state = inner.update(
                jax.tree.map(apply_leaf, grads, kept),
                cleared,
                jax.tree.map(apply_leaf, params, kept),
                **{"masks": old.masks, **extra},
            )
            if updater.regularize is not None:
                _, updates = updater.regularize(params, old, grads, updates)
            return updates, inner_state

        def finish(u: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
            if not _tree.is_float(u):
                return u
            if jnp.ndim(mask):
                # -w must be exact, so in no type narrower than that of the weight.
                dtype = jnp.promote_types(u.dtype, jnp.result_type(w))
                u = jnp.where(mask, u.astype(dtype), -w.astype(dtype))
            return jnp.where(finite, u, jnp.zeros((), u.dtype))

        updates, inner_state = update_when(finite, step, state.inner)
        updates = jax.tree.map(finish, updates, params, kept)
        if updater.after_step:
            stepped = optax.apply_updates(params, updates)
            new = updater.update(old, stepped, grads, finite=finite, **extra)
        if packed:
            new = new._replace(masks=pack_masks(new.masks, like=stored))
        return updates, SparseState(new, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse_lookahead(params: Tree) -> None:
    def is_lookahead(x: Any) -> bool:
        return isinstance(x, optax.LookaheadParams)

    if any(map(is_lookahead, jax.tree.leaves(params, is_leaf=is_lookahead))):
        raise ValueError(
            "sparsify cannot keep the slow weights of optax.LookaheadParams sparse. Put lookahead "
            "outside: optax.lookahead(jsp.sparsify(...), ...)."
        )


def _sparse_states(state: Any) -> list[SparseState]:
    """Every `SparseState` inside an optimizer state."""

    def is_sparse(x: Any) -> bool:
        return isinstance(x, SparseState)

    return [x for x in jax.tree.leaves(state, is_leaf=is_sparse) if is_sparse(x)]


def masks(state: Any) -> Tree:
    """The mask tree of bools inside an optimizer state, packed or not.

    Args:
        state: State of `sparsify`, or of any optimizer that contains it (chain, MultiSteps,
            multi_transform, ...). Of several, each is asked for the leaves it trains.

    Returns:
        Masks in the structure of the parameters; scalar True for leaves that are never pruned.

    Raises:
        ValueError: If there is no `sparsify` inside.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> tx = jsp.sparsify(optax.adam(1e-3), jsp.static(jsp.uniform(0.5), score=jsp.magnitude))
        >>> jsp.masks(tx.init({"w": jnp.array([[3.0, 1.0]])}))
        {'w': Array([[ True, False]], dtype=bool)}
    """
    states = _sparse_states(state)
    if not states:
        raise ValueError(
            "there is no sparsify in this optimizer state: pass the state of "
            "jsp.sparsify(inner, updater), or one that contains it."
        )
    trees = [unpack_masks(s.updater.masks) for s in states]

    def first(*leaves: Any) -> Any:
        shown = [leaf for leaf in leaves if not is_hidden(leaf)]
        return shown[0] if shown else jnp.array(True)

    return jax.tree.map(first, *trees, is_leaf=is_hidden)


def check(params: Tree, state: Any) -> None:
    """Raise if a weight is nonzero off its mask. On the host: it waits for the device.

    Something outside `sparsify` that rescales its updates breaks them and cannot be seen from
    inside; call this now and then, or in a test.

    Args:
        params: Parameters after at least one step (or `jsp.apply_masks(params, jsp.masks(state))`).
        state: Optimizer state that contains `sparsify`.

    Raises:
        ValueError: Names the first leaf that is not zero off its mask.

    Example:
        >>> import jax.numpy as jnp, optax, jaxsparse as jsp
        >>> tx = jsp.sparsify(optax.adam(1e-3), jsp.static(jsp.uniform(0.5), score=jsp.magnitude))
        >>> params = {"w": jnp.array([[3.0, 1.0]])}
        >>> state = tx.init(params)
        >>> jsp.check(jsp.apply_masks(params, jsp.masks(state)), state)
    """
    tree = masks(state)
    if any(getattr(s.updater, "dense_weights", False) for s in _sparse_states(state)):
        return  # straight-through: the weights are dense, the view is sparse
    _tree.same_structure(tree, params, "the masks of this state")
    for path, w, mask in zip(
        _tree.paths(params), jax.tree.leaves(params), jax.tree.leaves(tree), strict=True
    ):
        outside = 0 if not jnp.ndim(mask) else int(jnp.sum((w != 0) & ~mask, dtype=jnp.int32))
        if outside:
            raise ValueError(
                f"{path} has {outside} weights that are not zero off its mask. Either no step was "
                "taken yet (apply jsp.apply_masks(params, jsp.masks(state))), or something outside "
                "sparsify changes its updates: move it inside, as in "
                "sparsify(optax.chain(..., inner), updater)."
            )
