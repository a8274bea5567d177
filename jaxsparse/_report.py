"""What a mask or a stored weight costs, and what it really saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse._masks import kept_and_size
from jaxsparse._report_table import (
    DENSE,
    FASTER,
    MEMORY,
    UNMEASURED,
    ZEROS,
    LeafReport,
    Report,
)
from jaxsparse.formats import _break_even
from jaxsparse.formats._block_sparse import BlockSparse
from jaxsparse.formats._protocol import SparseWeight
from jaxsparse.plans import Plan, prunable
from jaxsparse.training._stored import Stored
from pallas_kernels import Topology

Tree = Any


def report(
    params: Tree,
    masks: Tree | None = None,
    plan: Plan | Callable[[Tree], Plan] | None = None,
    *,
    device: str | None = None,
) -> Report:
    """Per leaf and in total: kept weights, FLOPs, bytes, and whether a device gains anything.

    Args:
        params: Parameters. Weights like `BlockSparse` are leaves; so are the values and blocks of a
            `SparseLinear` in the state of an NNX model.
        masks: Mask tree of bools, e.g. `jsp.masks(state)`; or, for stored blocks, the second result
            of `blockify` or `state.updater.blocks`. Not needed where the parameters tell.
        plan: The plan or distribution that made the masks, which names the patterns. Without it
            masks count as unstructured.
        device: Kind of device (`jax.Device.device_kind`) to judge speed on; default: the first.

    Returns:
        A `Report`. FLOPs are those of `x @ w` for one row x: 2 a weight, 0 for embeddings and for
        leaves with fewer than two axes. Training takes three times as many. Without masks, leaves
        that are not of a floating type are left out.

    Raises:
        ValueError: If the masks do not fit the parameters; names the leaf.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> params, masks = jsp.prune({"w": jnp.ones((8, 8))}, jsp.uniform(0.75))
        >>> print(str(jsp.report(params, masks, device="none such")).splitlines()[2])
        w      (8 x 8)           16/64     75.0%    128 -> 32  256 -> 72  unmeasured
        >>> values, blocks = jsp.blockify(params, jsp.uniform(0.5, jsp.Block((4, 4))))
        >>> jsp.report(values, blocks).leaves[0].pattern
        'BlockSparse 4 x 4'
    """
    device = jax.devices()[0].device_kind if device is None else device
    table = _break_even.break_even().get(device, {})
    leaves = []
    if masks is not None and not _has_topology(masks):
        kept, sizes = kept_and_size(masks, params)
        if plan is not None and not isinstance(plan, Plan):
            plan = plan(params)
        for i, (path, leaf, mask) in enumerate(
            zip(_tree.paths(params), jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
        ):
            masked = jnp.ndim(mask) > 0
            name = type(plan.leaves[i].pattern).__name__ if plan is not None and masked else ""
            leaves.append(_of_array(path, leaf, int(kept[i]), sizes[i], masked, name, table))
    else:
        for path, leaf in _joined(params, masks):
            if isinstance(leaf, SparseWeight):
                leaves.append(_of_stored(path, leaf, device, table))
            elif masks is not None or _tree.is_float(leaf):
                size = math.prod(jnp.shape(leaf))
                leaves.append(_of_array(path, leaf, size, size, False, "", table))

    def total(field: str) -> int:
        return sum(getattr(leaf, field) for leaf in leaves)

    numbers = ["kept", "size", "flops_dense", "flops_sparse", "bytes_dense", "bytes_sparse"]
    whole = LeafReport("total", (), "", speed="", **{name: total(name) for name in numbers})
    return Report(tuple(leaves), whole, device)


def _of_array(
    path: str, leaf: Any, kept: int, size: int, masked: bool, pattern: str, table: dict[str, Any]
) -> LeafReport:
    """The row of an array and its mask."""
    bytes_dense = size * getattr(_tree.dtype_of(leaf), "itemsize", 0)
    flops = 2 * size if masked or prunable(path, leaf) else 0
    speed, bytes_sparse = DENSE, bytes_dense
    if masked:
        speed = _verdict(table.get(pattern or "Unstructured"), kept / size if size else 1.0, ZEROS)
        bytes_sparse = bytes_dense * kept // size + math.ceil(size / 8) if size else 0
    return LeafReport(
        path=path,
        shape=tuple(jnp.shape(leaf)),
        pattern=pattern,
        kept=kept,
        size=size,
        flops_dense=flops,
        flops_sparse=flops * kept // size if size else 0,
        bytes_dense=bytes_dense,
        bytes_sparse=bytes_sparse,
        speed=speed,
    )


def _of_stored(path: str, w: Any, device: str, table: dict[str, Any]) -> LeafReport:
    """The row of a weight that is stored without its zeros."""
    shape = jax.eval_shape(lambda w: w.todense(), w).shape
    size, kept, pattern = math.prod(shape), jax.tree.leaves(w)[0].size, type(w).__name__
    known, density = table.get(pattern), kept / size if size else 1.0
    if isinstance(w, BlockSparse):
        bk, bn = w.block
        limits = _break_even.block_limits(w.block, device)
        known = None if limits is None else {"density": limits.faster}
        kept, pattern = int(jnp.sum(w.topology.count)) * bk * bn, f"{pattern} {bk} x {bn}"
    arrays = [a for a in jax.tree.leaves(w) if not jnp.issubdtype(a.dtype, jax.dtypes.extended)]
    return LeafReport(
        path=path,
        shape=shape,
        pattern=pattern,
        kept=kept,
        size=size,
        flops_dense=2 * size,
        flops_sparse=2 * kept,
        bytes_dense=size * w.dtype.itemsize,
        bytes_sparse=sum(a.size * a.dtype.itemsize for a in arrays),
        speed=_verdict(known, density, MEMORY),
    )


def _verdict(known: dict[str, Any] | None, density: float, otherwise: str) -> str:
    if known is None:
        return UNMEASURED
    return FASTER if density <= known["density"] else otherwise


def _is_whole(x: Any) -> bool:
    return isinstance(x, Topology | Stored | SparseWeight)


def _has_topology(tree: Tree) -> bool:
    return any(isinstance(x, Topology) for x in jax.tree.leaves(tree, is_leaf=_is_whole))


def _joined(params: Tree, blocks: Tree | None) -> list[tuple[str, Any]]:
    """(path, leaf) of each leaf, values joined with their topology."""
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_whole)[0]
    leaves = [(_tree.path_str(path), leaf) for path, leaf in found]
    if blocks is not None:
        placed = jax.tree.leaves(blocks, is_leaf=_is_whole)
        if len(placed) != len(leaves):
            raise ValueError(
                f"the parameters have {len(leaves)} leaves, but blocks has {len(placed)}: pass "
                "both results of the same blockify."
            )
        pairs = zip(leaves, placed, strict=True)
        return [(path, _stored(path, leaf, topology)) for (path, leaf), topology in pairs]
    # As a SparseLinear has them: `up/values` and `up/blocks`.
    beside = {path.rpartition("/")[0]: leaf for path, leaf in leaves if isinstance(leaf, Topology)}
    joined = []
    for path, leaf in leaves:
        parent, _, name = path.rpartition("/")
        if name == "values" and parent in beside:
            leaf = _stored(path, leaf, beside[parent])
        if not isinstance(leaf, Topology):
            joined.append((path, leaf))
    return joined


def _stored(path: str, leaf: Any, topology: Any) -> Any:
    if not isinstance(topology, Topology):
        return leaf
    values = leaf.values if isinstance(leaf, Stored) else leaf
    if jnp.shape(values)[:-2] != topology.rows.shape:
        raise ValueError(
            f"{path} has values {jnp.shape(values)}, but its topology has slots "
            f"{topology.rows.shape}. Values are [..., S, bk, bn]: pass both results of the same "
            "blockify."
        )
    return BlockSparse(values, topology)
