"""A product whose three passes, forward and two backward, can each be n:m sparse.

BDWP: Fang et al., Efficient N:M sparse DNN training using algorithm, architecture, and dataflow
co-design, 2023, arXiv:2309.13015.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.patterns import NM, make_mask
from jaxsparse.training._mvue import mvue


def nm_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    forward: NM | None = None,
    backward: NM | None = None,
    gradient: NM | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """`x @ w` with n:m sparse factors in each of the three products of training.

    y = x @ F(w);  dx = dy @ B(w)^T;  dw = x^T @ G(dy). F and B keep the largest |w| of their
    groups, G samples the gradient without bias (`mvue`); the dense w gets the whole of dw.

    So that hardware for n:m can run it, groups lie along the axis that is summed over: the inputs
    for y, the outputs for dx, the tokens for dw. BDWP is `forward=NM(2, 8), backward=NM(2, 8,
    axis=-1)`. With a view of `s_ste`, or of `sr_ste` and a `TransposableNM`, the weight is n:m
    already, and `gradient=NM(2, 4)` is all that is left to do.

    Args:
        x: `[..., K]`.
        w: `[K, N]`; for stacked weights use `jax.vmap`.
        forward: Pattern of w in the forward product, or None for all of w.
        backward: Pattern of w in the product for dx.
        gradient: Pattern of dy in the product for dw, along the tokens (axis -2).
        key: Random key for `gradient`; a new one at every step.

    Returns:
        `[..., N]`. What is computed is masked, not skipped: no hardware product is called.

    Raises:
        ValueError: If `gradient` is given without `key`, lies along the outputs, or does not divide
            the number of tokens; if a pattern does not fit w; if w does not have two axes.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> x, w = jnp.ones((4, 2)), jnp.array([[1.0, 4.0], [2.0, 3.0]])
        >>> half, turned = jsp.NM(1, 2), jsp.NM(1, 2, axis=-1)
        >>> jsp.nm_matmul(x, w, forward=half)[0]
        Array([2., 4.], dtype=float32)
        >>> jax.grad(lambda x: jsp.nm_matmul(x, w, forward=half, backward=turned).sum())(x)[0]
        Array([4., 3.], dtype=float32)

    Cost: a selection for each pattern of w, in each call; `mvue` for the gradient. Memory of the
    dense product.

    Deviations: the method is read from the paper's abstract and our notes; that the two masks come
    from the dense weight independently of one another is the part that nobody has checked against
    code. Bi-Mask (Zhang et al., 2023) permutes rows first, which is left out. That G samples along
    the tokens, and for dw only, was checked against the code of S-STE.

    References: Fang et al., 2023, arXiv:2309.13015; Hu et al., 2024, arXiv:2404.01847; Zhang et
    al., Bi-directional masks for efficient N:M sparse training, 2023, arXiv:2302.06058.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    if w.ndim != 2:
        raise ValueError(f"nm_matmul needs a weight [K, N]; got {w.shape}. Use jax.vmap.")
    if gradient is not None:
        tokens = x.size // max(x.shape[-1], 1)
        if key is None:
            raise ValueError("nm_matmul samples gradients with gradient=, and needs key= for it.")
        if gradient.axis != -2 or tokens % gradient.m:
            raise ValueError(
                f"nm_matmul(gradient=) samples along the tokens, so axis=-2 and a multiple of "
                f"{gradient.m} of them; got {gradient} and {tokens} tokens. Pad or drop some."
            )
    y = jnp.asarray(_matmul(forward, backward, gradient, x.reshape(-1, x.shape[-1]), w, key))
    return y.reshape(*x.shape[:-1], w.shape[-1])


def _largest(pattern: NM | None, w: jax.Array) -> jax.Array:
    if pattern is None:
        return w
    mask = make_mask(pattern, jnp.abs(w), pattern.n / pattern.m)
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(
    forward: NM | None,
    backward: NM | None,
    gradient: NM | None,
    x: jax.Array,
    w: jax.Array,
    key: Any,
) -> jax.Array:
    return x @ _largest(forward, w)


def _fwd(forward: NM | None, backward: NM | None, gradient: NM | None, *args: Any) -> Any:
    return _matmul(forward, backward, gradient, *args), args


def _bwd(forward: NM | None, backward: NM | None, gradient: NM | None, args: Any, dy: Any) -> Any:
    x, w, key = args
    dx = dy @ _largest(backward, w).T
    sampled = dy if gradient is None else mvue(gradient, dy, key=key)
    return dx.astype(x.dtype), (x.T @ sampled).astype(w.dtype), None


_matmul.defvjp(_fwd, _bwd)
