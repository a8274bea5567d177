"""A model of experts from a dense one.

References: Komatsuzaki et al., Sparse upcycling: Training mixture-of-experts from dense
checkpoints, 2022, arXiv:2212.05055; Yang et al., XMoE, 2024, arXiv:2403.18926 (cutting a layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._tree import leaf_key, path_str, paths, unmatched

Tree = Any


def upcycle(
    dense: Tree,
    sparse: Tree,
    plan: Mapping[str, str],
    *,
    noise: float = 0.0,
    key: jax.Array | None = None,
) -> Tree:
    """The parameters `sparse` of a model of experts, started from those of a dense model.

    A leaf that the plan names comes from the dense leaf it names; any other leaf with the path and
    shape of a dense leaf is that leaf; what is left, such as the router, stays as it is. From a
    matrix [..., K, N] the leaf [..., E, K, N] gets E copies. One of [..., E, K, N / m], or
    [..., E, K / m, N], gets the matrix cut into m slices, expert e slice e mod m: E = m experts
    that all run with weight 1 are the dense layer.

    With copies and weights that sum to one (`token_choice(k)`) the model computes what the dense
    one does; with weights that do not it starts with a drop in quality.

    Args:
        dense: Parameters of the dense model.
        sparse: Parameters of the model of experts, as made at random.
        plan: Path in `sparse` -> path in `dense`.
        noise: Each copy is multiplied by 1 + noise * normal, so that experts differ from the start.
        key: For the noise.

    Returns:
        A tree like `sparse`, of its dtypes.

    Raises:
        ValueError: If a path of the plan does not exist, or shapes do not fit; nothing is changed.

    Example:
        >>> import jaxsparse as jsp
        >>> dense = {"mlp": jnp.arange(4.0).reshape(2, 2), "head": jnp.ones(2)}
        >>> sparse = {"experts": jnp.zeros((2, 2, 2)), "router": jnp.ones(3), "head": jnp.zeros(2)}
        >>> new = jsp.moe.upcycle(dense, sparse, {"experts": "mlp"})
        >>> new["experts"][1].tolist(), new["head"].tolist(), new["router"].tolist()
        ([[0.0, 1.0], [2.0, 3.0]], [1.0, 1.0], [1.0, 1.0, 1.0])

    Cost: one copy of the parameters.

    Deviations: the optimizer's state is a second step, `upcycle_state`.

    References: Komatsuzaki et al., Sparse upcycling, 2022, arXiv:2212.05055.
    """
    if noise and key is None:
        raise ValueError("upcycle with noise needs key=, a jax.random.key.")
    source = dict(zip(paths(dense), jax.tree.leaves(dense), strict=True))
    names = paths(sparse)
    for there, here in plan.items():
        if there not in names:
            raise unmatched(there, names, "plan")
        if here not in source:
            raise unmatched(here, list(source), "plan")

    def new(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_str(path)
        if name in plan:
            made = _experts(name, source[plan[name]], leaf.shape)
            if key is not None and noise and made.ndim != source[plan[name]].ndim:
                made *= 1 + noise * jax.random.normal(leaf_key(key, name), made.shape, made.dtype)
            return made.astype(leaf.dtype)
        if name in source and source[name].shape == leaf.shape:
            return source[name].astype(leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(new, sparse)


def upcycle_state(
    dense_state: Tree,
    sparse_state: Tree,
    dense: Tree,
    sparse: Tree,
    plan: Mapping[str, str],
) -> Tree:
    """The optimizer's state of a model of experts, with the moments and counts of the dense one.

    Every part of the state that is shaped like the parameters is upcycled as they are (without
    noise); counts and other leaves of equal place and shape are copied. Give
    `sparse_state = tx.init(sparse)` of the same optimizer.

    Args:
        dense_state: State of the dense run.
        sparse_state: Fresh state of the same optimizer for `sparse`.
        dense: Parameters of the dense run.
        sparse: Parameters of the model of experts.
        plan: As for `upcycle`.

    Returns:
        A tree like `sparse_state`.

    Raises:
        ValueError: If the two states are not of one optimizer.

    Example:
        >>> import optax, jaxsparse as jsp
        >>> dense, sparse, tx = {"w": jnp.ones((1, 1))}, {"w": jnp.ones((2, 1, 1))}, optax.adam(0.1)
        >>> _, state = tx.update(dense, tx.init(dense))
        >>> new = jsp.moe.upcycle_state(state, tx.init(sparse), dense, sparse, {"w": "w"})
        >>> new[0].mu["w"].shape, int(new[0].count)
        ((2, 1, 1), 1)

    Cost: one copy of the state.
    """
    here, there = jax.tree.structure(dense), jax.tree.structure(sparse)

    def parts(state: Tree, structure: Any) -> tuple[list[Any], Any]:
        return jax.tree.flatten(state, is_leaf=lambda t: jax.tree.structure(t) == structure)

    (old, _), (new, outside) = parts(dense_state, here), parts(sparse_state, there)
    if len(old) != len(new):
        raise ValueError(
            f"the states must be of one optimizer; they have {len(old)} and {len(new)} parts."
        )

    def part(old: Any, new: Any) -> Any:
        if jax.tree.structure(old) == here and jax.tree.structure(new) == there:
            return upcycle(old, new, plan)
        return old if jnp.shape(old) == jnp.shape(new) else new

    return outside.unflatten(list(map(part, old, new)))


def _experts(name: str, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The experts of `shape` from a matrix: itself, copies of it, or its slices."""
    if matrix.shape == shape:
        return matrix
    *lead, k, n = matrix.shape
    if len(shape) == matrix.ndim + 1 and shape[: len(lead)] == tuple(lead):
        experts, rows, cols = shape[-3:]
        if (rows, cols) == (k, n):
            return jnp.broadcast_to(matrix[..., None, :, :], shape)
        for axis, whole, part in ((-1, n, cols), (-2, k, rows)):
            other = rows == k if axis == -1 else cols == n
            if other and whole % part == 0 and experts % (whole // part) == 0:
                slices = jnp.stack(jnp.split(matrix, whole // part, axis), -3)
                return jnp.concatenate([slices] * (experts // (whole // part)), -3)
    raise ValueError(
        f"plan: {name} of shape {shape} cannot come from a matrix {matrix.shape}: it must be that "
        "shape with an axis of experts before the last two, whole or cut evenly along one of them, "
        "the number of experts a multiple of the cuts."
    )
