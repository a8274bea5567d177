"""Probes: the size of the gradient of blocks, stored or not, measured in the backward pass.

To find blocks worth growing one wants |G_rc|, the norm of the gradient at block (r, c), without
keeping the dense gradient G = x^T dy. A probe is a parameter p [R, C] that is always zero, so that
the forward pass has nothing to do; what stands for its gradient is the measurement, one number a
block. There are two kinds.

`Sketch`. With random signs u [bk] and v [bn], E (u^T G_rc v)^2 = |G_rc|^2, and

    P_rc = u^T G_rc v = (x_r u)^T (dy_c v)

is one product [R, M] x [M, C], 1 / (bk bn) of the dense one, after a pass over x and dy. P is the
exact gradient of a p that adds p_rc u v^T to each block, so it adds up like any gradient: over uses
of a weight, micro-batches and devices.

`Norms`. |G_rc| itself, of all blocks or of some of each column, when it is due and zero otherwise.
One block column of G is made at a time and reduced at once. A norm is no linear function of the
batch: of a weight that is used twice, of micro-batches, and of devices that average gradients
themselves one gets the sum or the mean of their norms. Under jit with a batch that is sharded, x
and dy are the whole batch, and the norm is that of the whole gradient.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _tree
from pallas_kernels._op import sum_to, sum_type, vary_alike


class Probe(Protocol):
    """What a weight in blocks needs to be probed; leading axes are stacked weights."""

    @property
    def at(self) -> jax.Array:
        """Zeros `[..., R, C]`; what stands for their gradient is the measurement."""
        ...

    def measure(self, x: jax.Array, dy: jax.Array) -> jax.Array:
        """`[R, C]` from x `[M, K]` and dy `[M, N]`, for y = x @ W; no leading axes."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["at", "u", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sketch:
    """Measures u^T G_rc v of every block.

    Attributes:
        at: Zeros `[..., R, C]`.
        u: Signs `[..., bk]`.
        v: Signs `[..., bn]`.
    """

    at: jax.Array
    u: jax.Array
    v: jax.Array

    def measure(self, x: jax.Array, dy: jax.Array) -> jax.Array:
        """See `Probe`."""
        wide = sum_type(x.dtype)

        def reduced(a: jax.Array, signs: jax.Array) -> jax.Array:
            tiles = a.reshape(a.shape[0], -1, signs.shape[0])
            signs = signs.astype(a.dtype)
            return jnp.einsum("mgb,b->mg", tiles, signs, preferred_element_type=wide)

        return sum_to(jnp.einsum("mr,mc->rc", reduced(x, self.u), reduced(dy, self.v)), self.at)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["at", "due", "key", "rows"],
    meta_fields=["others"],
)
@dataclasses.dataclass(frozen=True)
class Norms:
    """Measures |G_rc| of every block, or of those that are stored and some others.

    Attributes:
        at: Zeros `[..., R, C]`.
        due: bool `[...]`; where False nothing is measured, at no cost.
        key: Random keys `[...]` of the choice of others.
        rows: int32 `[..., C, W]`, the stored block rows of each column; R for none.
        others: How many others of each column, at random; None measures all.
    """

    at: jax.Array
    due: jax.Array
    key: jax.Array
    rows: jax.Array
    others: int | None

    def measure(self, x: jax.Array, dy: jax.Array) -> jax.Array:
        """See `Probe`."""
        (r, c), width = self.at.shape, self.rows.shape[1]
        some = r if self.others is None else min(r, width + self.others)
        wide = sum_type(x.dtype)

        def column(x: jax.Array, rows: jax.Array, dy: jax.Array) -> jax.Array:
            """Norms `[some]` at `rows` of one column; dy `[M, bn]`."""
            if some < r:
                x = x.reshape(x.shape[0], r, -1)[:, rows].reshape(x.shape[0], -1)
            # The transpose of the gradient: its small side last would be slow on a CPU.
            blocks = jnp.einsum("mn,mk->nk", dy, x, preferred_element_type=wide)
            blocks = sum_to(blocks, self.at)  # over devices that hold other rows of x
            return jnp.sqrt(jnp.sum(jnp.square(blocks).reshape(dy.shape[1], some, -1), (0, 2)))

        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            due, _ = state
            # Always due here, which the compiler cannot know: else it would move work that depends
            # on x and dy alone out of the loop, where every step pays for it.
            here, there = (_tree.zero_unless(due, a) for a in (x.astype(dy.dtype), dy))
            rows = self._chosen(some)
            panels = there.reshape(there.shape[0], c, -1).swapaxes(0, 1)
            norms = lax.map(lambda a: column(here, *a), (rows, panels))
            found = jnp.zeros((c, r), wide)
            return jnp.zeros_like(due), found.at[jnp.arange(c)[:, None], rows].set(norms).T

        # A loop of zero or one trips: unlike `lax.cond` it stays a branch under vmap.
        start = self.due, vary_alike(jnp.zeros(self.at.shape, wide), self.at)[0]
        return lax.while_loop(lambda state: state[0], body, start)[1]

    def _chosen(self, some: int) -> jax.Array:
        """Block rows `[C, some]` to measure: those that are stored first, then at random."""
        r, c = self.at.shape
        everyone = jnp.arange(r, dtype=jnp.int32)
        if some == r:
            return jnp.broadcast_to(everyone, (c, r))
        stored = jnp.any(self.rows[..., None] == everyone, 1)  # [C, R]
        noise = jax.random.uniform(self.key, stored.shape)
        return lax.top_k(jnp.where(stored, 2.0, noise), some)[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attach(transposed: bool, y: jax.Array, x: jax.Array, probe: Any) -> jax.Array:
    """Y as it is, such that the gradient of `probe.at` is what the probe measures.

    Args:
        transposed: Whether y = x @ W^T.
        y: `[M, N]` = x @ W, or `[M, K]`.
        x: `[M, K]`, or `[M, N]`.
        probe: A `Probe` of W.
    """
    del transposed, x, probe
    return y


def _attach_forward(
    transposed: bool, y: jax.Array, x: jax.Array, probe: Any
) -> tuple[jax.Array, tuple]:
    del transposed
    return y, (x, probe)


def _attach_backward(transposed: bool, saved: tuple[jax.Array, Any], dy: jax.Array) -> tuple:
    x, probe = saved
    # For y = x W^T the gradient of W is dy^T x: x and dy change places.
    found = probe.measure(*((dy, x) if transposed else (x, dy))).astype(probe.at.dtype)
    leaves, treedef = jax.tree.flatten(probe)
    none = treedef.unflatten([None] * len(leaves))
    return dy, jnp.zeros_like(x), dataclasses.replace(none, at=found)


attach.defvjp(_attach_forward, _attach_backward)
