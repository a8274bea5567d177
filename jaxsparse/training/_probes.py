"""How to find out which blocks, stored or not, have a large gradient; see `formats/_probe.py`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse.formats._probe import Norms, Probe, Sketch
from pallas_kernels import Topology

# zeros [..., R, C], values [..., S, bk, bn], topology, key of this step, due -> Probe
ProbeOf = Callable[[jax.Array, jax.Array, Topology, jax.Array, jax.Array], Probe]


def sketch_probe() -> ProbeOf:
    """Measure every block a little at every step: the gradient under random signs.

    With signs u and v that change from step to step, (u^T G v)^2 is |G|^2 on average, for each
    block G of the gradient. What is summed between two updates has an error of the order of
    sqrt(2 / steps) for each block, and tells of all batches on the way. Adds up exactly over
    micro-batches, devices and uses of a weight.

    Returns:
        For `probe=` of `block_rigl` and `block_gradual`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> values, blocks = jsp.blockify([jnp.eye(8)], jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> updater = jsp.block_rigl(
        ...     blocks, key=jax.random.key(0), when=jsp.every(10), probe=jsp.sketch_probe()
        ... )

    Cost: a step, one pass over x and dy of each layer and 1 / (bk * bn) of the FLOPs of a dense
    gradient.
    """

    def of(
        at: jax.Array, values: jax.Array, topology: Topology, key: jax.Array, due: jax.Array
    ) -> Probe:
        del due
        lead, (*_, bk, bn) = topology.rows.shape[:-1], values.shape
        ku, kv = jax.random.split(key)
        u = jax.random.rademacher(ku, (*lead, bk), values.dtype)
        return Sketch(at, u, jax.random.rademacher(kv, (*lead, bn), values.dtype))

    return of


def exact_probe() -> ProbeOf:
    """Measure every block exactly, at the steps of updates only.

    The gradient of a whole layer is made in its backward pass, block column by block column, and
    reduced to norms at once; it is never kept. This is RigL's evidence: one batch.

    Of a weight that is used twice, of micro-batches (`optax.MultiSteps`), of a model that is mapped
    over examples with `jax.vmap`, and of devices that average gradients themselves
    (`jax.shard_map`), one gets the sum or the mean of the norms instead of the norm of the sum.
    Batches that jit shards are one batch.

    Returns:
        For `probe=` of `block_rigl` and `block_gradual`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> values, blocks = jsp.blockify([jnp.eye(8)], jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> updater = jsp.block_rigl(
        ...     blocks, key=jax.random.key(0), when=jsp.every(10), probe=jsp.exact_probe()
        ... )

    Cost: the FLOPs of a dense gradient at the steps of updates, nothing at others; memory of one
    block column, K * bn numbers.
    """
    return _norms(None)


def candidate_probe(count: int) -> ProbeOf:
    """Measure the stored blocks and `count` random others of each column, at the steps of updates.

    Only what was measured can come in, so one update looks at `count` places of a column and the
    next at others.

    Args:
        count: Candidates of each block column, at least 1; all of them if it has fewer.

    Returns:
        For `probe=` of `block_rigl` and `block_gradual`. What `exact_probe` says of sums of norms
        holds here too.

    Raises:
        ValueError: If count is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> values, blocks = jsp.blockify([jnp.eye(8)], jsp.uniform(0.5, jsp.Block((2, 2))))
        >>> updater = jsp.block_rigl(
        ...     blocks, key=jax.random.key(0), when=jsp.every(10), probe=jsp.candidate_probe(1)
        ... )

    Cost: the FLOPs of a gradient of the stored blocks and the candidates at the steps of updates,
    nothing at others.
    """
    if count < 1:
        raise ValueError(
            f"candidate_probe(count) measures count blocks of each column that are not stored, at "
            f"least 1; got {count}. To grow at random, without measuring, take block_set."
        )
    return _norms(count)


def _norms(others: int | None) -> ProbeOf:
    def of(
        at: jax.Array, values: jax.Array, topology: Topology, key: jax.Array, due: jax.Array
    ) -> Probe:
        del values
        lead, (_, c) = topology.rows.shape[:-1], topology.grid
        rows = topology.rows.reshape(*lead, c, -1)
        return Norms(at, jnp.broadcast_to(due, lead), jax.random.split(key, lead), rows, others)

    return of
