"""The leaves of a state, as they are stored and as they come back.

Leaves are stored under their paths. Containers (NamedTuple, NNX state, `MaskedNode`, `None`) are
not stored: they come from a template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, Sharding

from jaxsparse._tree import paths

Tree = Any


def leaves(tree: Tree) -> dict[str, Any]:
    """Leaves by path, in flatten order."""
    names = paths(tree)
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"Two leaves have the path {twice}. Rename one of them.")
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def specs(named: dict[str, Any]) -> dict[str, str]:
    """Dtype and shape of each leaf, `float32[2, 3]`; a TypeError for what is not an array."""
    found = {}
    for name, leaf in named.items():
        array = _array(leaf)
        if not _is_key(leaf) and array.dtype.kind in "OUSMm":
            raise TypeError(f"Leaf {name} must be an array or a number; got {leaf!r:.80}.")
        found[name] = f"{array.dtype}{list(array.shape)}"
    return found


def encode(leaf: Any) -> Any:
    """A leaf for orbax, which copies host arrays itself."""
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    # With several processes orbax refuses what one alone holds: an uncommitted count, a key.
    local = jax.process_count() > 1 and getattr(leaf, "is_fully_addressable", True)
    return leaf if isinstance(leaf, jax.Array) and not local else np.asarray(leaf)


def is_weak(leaf: Any) -> bool:
    """Whether a leaf promotes as a Python number does."""
    return getattr(leaf, "weak_type", False)


def target(like: Any, weak: bool = False) -> Any:
    """What orbax is asked for: an array where the template says where, otherwise a numpy one."""
    if _is_key(like):
        like = jax.eval_shape(jax.random.key_data, like)
    elif _sharding(like) is not None and not weak:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=_sharding(like))
    return np.broadcast_to(np.zeros((), _array(like).dtype), np.shape(like))


def place(value: Any, like: Any, weak: bool = False) -> Any:
    """A leaf as read -> the type and sharding of the template, and weak if it was saved so."""
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return value if isinstance(like, np.ndarray) else type(like)(value.item())
    if _is_key(like):
        impl = jax.random.key_impl(jnp.empty((), like.dtype))
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
    elif weak:  # a strong float32 would turn products with bf16 into float32
        value = jnp.full(like.shape, np.zeros((), like.dtype).item()).at[...].set(value)
    return jax.device_put(value, _sharding(like))


def pack(name: str, mask: Any) -> np.ndarray:
    """Bool [...] -> uint8 [ceil(size / 8)]."""
    if not getattr(mask, "is_fully_addressable", True):
        mask = multihost_utils.process_allgather(mask, tiled=True)
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"Mask {name} must be bool; got {mask.dtype}. Pass jsp.masks(opt_state).")
    return np.packbits(mask)


def packed_like(shape: Sequence[int]) -> np.ndarray:
    """The template of a packed mask."""
    return np.zeros(-(-prod(shape) // 8), np.uint8)


def unpack(bits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Undo `pack`."""
    return np.unpackbits(bits, count=prod(shape)).reshape(shape).astype(bool)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _array(leaf: Any) -> Any:
    """A Python number as an array, anything else as it is."""
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _sharding(like: Any) -> Sharding | None:
    """Where a template wants its leaf; None is the default device, uncommitted."""
    sharding = getattr(like, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()  # eval_shape on a mesh with explicit axes
        return None if mesh.empty else NamedSharding(mesh, sharding.spec)
    return sharding if getattr(like, "committed", True) else None
