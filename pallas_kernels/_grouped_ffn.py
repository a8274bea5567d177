"""The gated feed-forward layer of experts: y_t = (act(x_t Wg_e) * (x_t Wu_e)) Wd_e, e of row t.

With g = x Wg, u = x Wu, h = act(g) u: dh = dy Wd^T, du = act(g) dh, dg = act'(g) u dh, dx = dg Wg^T
+ du Wu^T, and the gradients of weights are products of the rows of a group, see
`_grouped_matmul.py`. 6 K H FLOPs a row forward and twice that backward.

Gated linear units: Shazeer, 2020, arXiv:2002.05202. Experts without dropped rows: Gale et al.,
MegaBlocks, 2022, arXiv:2211.15841.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _grouped_ffn_xla as xla
from pallas_kernels import _grouped_matmul as matmul
from pallas_kernels._block_sparse_gated_xla import Activation, gated, slopes
from pallas_kernels._op import KernelOp, choose, sum_type, vary_alike


class Implementation(NamedTuple):
    """What an implementation is made of; weights are (gate, up, down).

    Attributes:
        forward: (x, *weights, group_sizes, activation) -> y.
        keeping: The same -> y, x @ Wg, x @ Wu.
        gradients: (x, dy, x @ Wg, x @ Wu, *weights, group_sizes, activation) -> gradients of x and
            of the weights.
    """

    forward: Any
    keeping: Any
    gradients: Any


def three_products(name: str) -> Implementation:
    """One weight after the other, by an implementation of `grouped_matmul`."""
    single = matmul.IMPLEMENTATIONS[name]

    def keeping(
        x: jax.Array,
        gate: jax.Array,
        up: jax.Array,
        down: jax.Array,
        sizes: jax.Array,
        activation: Activation,
    ) -> tuple[jax.Array, ...]:
        g, u = (single.matmul(x, w, sizes, False) for w in (gate, up))
        return single.matmul(gated(g, u, activation), down, sizes, False), g, u

    def gradients(
        x: jax.Array,
        dy: jax.Array,
        g: jax.Array,
        u: jax.Array,
        gate: jax.Array,
        up: jax.Array,
        down: jax.Array,
        sizes: jax.Array,
        activation: Activation,
    ) -> tuple[jax.Array, ...]:
        dh, ddown = single.gradients(gated(g, u, activation), dy, down, sizes, False)
        dg, du = slopes(g, u, dh, activation)
        dx, dgate = single.gradients(x, dg, gate, sizes, False)
        more, dup = single.gradients(x, du, up, sizes, False)
        return dx + more, dgate, dup, ddown

    return Implementation(lambda *a: keeping(*a)[0], keeping, gradients)


IMPLEMENTATIONS = {
    "xla": Implementation(
        lambda *a: xla.forward(*a)[0], lambda *a: xla.forward(*a, keep=True), xla.gradients
    ),
    "tpu": three_products("tpu"),
}


def grouped_ffn(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: Activation = jax.nn.silu,
    implementation: str | None = None,
) -> jax.Array:
    """(activation(x @ gate) * (x @ up)) @ down, with the matrices of the group of each row.

    Groups as in `grouped_matmul`: rows sorted by group, sizes of any kind, rows past their sum give
    zero, and new sizes never recompile. Differentiable in x and the three weights.

    Args:
        x: `[T, K]`, sorted by group. Dtypes of x and weights promote.
        gate: `[E, K, H]`, the weights under the activation.
        up: `[E, K, H]`.
        down: `[E, H, K]`.
        group_sizes: Integers `[E]`, 0 or more, whose sum is at most T.
        activation: A function of entries without parameters of its own. It is static: give the same
            function each time, not a new lambda, or jit compiles again.
        implementation: "tpu" or "xla"; chosen by device if not given.

    Returns:
        `[T, K]`; sums are float32 or wider.

    Raises:
        ValueError: If shapes do not fit, if known sizes are negative or exceed T, or if there is no
            such implementation. Inside jit, `jax.experimental.checkify` checks the sizes.
        TypeError: If group_sizes are not integers.
        NotImplementedError: If the device cannot run `implementation`.

    Example:
        >>> from pallas_kernels import grouped_ffn
        >>> w = jnp.array([1.0, 2.0]).reshape(2, 1, 1)
        >>> x, sizes = jnp.ones((3, 1)), jnp.array([1, 2])
        >>> grouped_ffn(x, w, w, w, sizes, activation=jax.nn.relu)[:, 0]
        Array([1., 8., 8.], dtype=float32)

    Cost: "xla" goes over the rows once, and without differentiation keeps nothing whole but the
    result; "tpu" is three times `grouped_matmul` and has x @ gate and x @ up whole. Under
    differentiation both keep x, x @ gate and x @ up; under `jax.checkpoint` only x.

    Deviations: "tpu" rounds x @ gate and x @ up to the dtype of the result before the activation,
    "xla" only where it keeps them for the backward pass.

    References: Gale et al., MegaBlocks, 2022, arXiv:2211.15841. Shazeer, 2020, arXiv:2002.05202.
    """
    choice = choose("grouped_ffn", IMPLEMENTATIONS, implementation)
    if up.shape != gate.shape or down.ndim != 3 or down.swapaxes(1, 2).shape != gate.shape:
        raise ValueError(
            "gate and up must be [E, K, H] and down [E, H, K]; got "
            f"{gate.shape}, {up.shape} and {down.shape}."
        )
    matmul.check(x, gate, group_sizes)
    dtype = jnp.result_type(x, gate, up, down)
    x, gate, up, down = (a.astype(dtype) for a in (x, gate, up, down))
    if not x.size or not gate.size:
        return jnp.zeros(x.shape, dtype)
    if implementation is None:
        for weight in (gate, down):
            choice = matmul.fallback(choice, dtype, x.shape[0], *weight.shape)
    x, gate, up, down, group_sizes = vary_alike(x, gate, up, down, group_sizes)
    y: jax.Array = _ffn(choice, activation, x, gate, up, down, group_sizes)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ffn(
    choice: str,
    activation: Activation,
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
) -> jax.Array:
    return IMPLEMENTATIONS[choice].forward(x, gate, up, down, group_sizes, activation)


def _forward(choice, activation, *operands):
    x, *weights_and_sizes = operands
    y, g, u = IMPLEMENTATIONS[choice].keeping(*operands, activation)
    return y, (x, g, u, *weights_and_sizes)


def _backward(choice, activation, saved, dy):
    x, *rest = saved
    return *IMPLEMENTATIONS[choice].gradients(x, dy, *rest, activation), None


_ffn.defvjp(_forward, _backward)


def reference(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: Activation = jax.nn.silu,
) -> jax.Array:
    """The same by dense products of every group, in float32."""
    dtype = jnp.result_type(x, gate, up, down)
    wide = sum_type(dtype)
    x, gate, up, down = (a.astype(wide) for a in (x, gate, up, down))
    g, u = (matmul.reference(x, w, group_sizes) for w in (gate, up))
    return matmul.reference(activation(g) * u, down, group_sizes).astype(dtype)


CASES = matmul.CASES

OP = KernelOp("grouped_ffn", grouped_ffn, reference, IMPLEMENTATIONS, CASES)
