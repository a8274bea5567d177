"""A probe: the size of the gradient of every block, stored or not, for one small product.

To find blocks worth growing one wants |G_rc|, the norm of the gradient at block (r, c), without the
dense gradient G = x^T dy. With random signs u [bk] and v [bn], E (u^T G_rc v)^2 = |G_rc|^2, and

    P_rc = u^T G_rc v = (x_r u)^T (dy_c v)

is one product [R, M] x [M, C], 1 / (bk bn) of the dense one, after a pass over x and dy. P is the
exact gradient of a parameter p [R, C] that adds p_rc u v^T to each block; as p is always zero the
forward pass has nothing to do, and the optimizer sees one number for each block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._op import sum_type


class Probe(NamedTuple):
    """What a weight in blocks needs to be probed; leading axes are stacked weights.

    Attributes:
        at: Zeros `[..., R, C]`; their gradient is P.
        u: Signs `[..., bk]`.
        v: Signs `[..., bn]`.
    """

    at: jax.Array
    u: jax.Array
    v: jax.Array


@jax.custom_vjp
def attach(y: jax.Array, x: jax.Array, probe: Probe) -> jax.Array:
    """Y as it is, such that the gradient of `probe.at` is P, for y `[M, N]` = x `[M, K]` @ W."""
    del x, probe
    return y


def _attach_forward(y: jax.Array, x: jax.Array, probe: Probe) -> tuple[jax.Array, tuple]:
    return y, (x, probe)


def _attach_backward(saved: tuple[jax.Array, Probe], dy: jax.Array) -> tuple:
    x, probe = saved
    wide = sum_type(x.dtype)

    def reduced(a: jax.Array, signs: jax.Array) -> jax.Array:
        tiles = a.reshape(a.shape[0], -1, signs.shape[0])
        return jnp.einsum("mgb,b->mg", tiles, signs.astype(a.dtype), preferred_element_type=wide)

    at = jnp.einsum("mr,mc->rc", reduced(x, probe.u), reduced(dy, probe.v))
    none = Probe(at.astype(probe.at.dtype), jnp.zeros_like(probe.u), jnp.zeros_like(probe.v))
    return dy, jnp.zeros_like(x), none


attach.defvjp(_attach_forward, _attach_backward)
