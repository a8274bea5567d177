"""Joining the results of attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge_attention(
    outs: Sequence[jax.Array], lses: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from that over each of them.

    With Z_i = exp(lse_i): out = sum_i Z_i out_i / sum_i Z_i, lse = log sum_i Z_i. Differentiable.

    Args:
        outs: Each `[B, T, H, D]`, zero where a query saw no key.
        lses: Each `[B, T, H]`, natural logarithm of the sum of exponentials; -inf for no key.

    Returns:
        out of the dtype of the first, and lse in float32.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> from pallas_kernels import merge_attention
        >>> one = jnp.ones((1, 1, 1, 2))
        >>> out, lse = merge_attention([one, 3 * one], [jnp.zeros((1, 1, 1))] * 2)
        >>> out.ravel().tolist(), lse.ravel().tolist()
        ([2.0, 2.0], [0.6931471824645996])

    Cost: one pass over the outputs.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"needs as many lses as outs, at least one; got {len(outs)}, {len(lses)}.")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"every out has one shape, here {outs[0].shape}, and its lse that without the last "
                f"axis; got {out.shape} and {lse.shape}."
            )
    stacked = jnp.stack([lse.astype(jnp.float32) for lse in lses])
    highest = jax.lax.stop_gradient(stacked.max(0))
    nothing = highest == -jnp.inf
    # A query that saw nothing: exp(0) of finite numbers, so that no gradient is NaN.
    safe = jnp.where(stacked == -jnp.inf, -jnp.inf, stacked - jnp.where(nothing, 0.0, highest))
    parts = jnp.where(stacked == -jnp.inf, 0.0, jnp.exp(jnp.where(safe == -jnp.inf, 0.0, safe)))
    total = parts.sum(0)
    share = parts / jnp.where(nothing, 1.0, total)
    out = sum(s[..., None] * o.astype(jnp.float32) for s, o in zip(share, outs, strict=True))
    lse = jnp.where(nothing, -jnp.inf, highest + jnp.log(jnp.where(nothing, 1.0, total)))
    return jnp.asarray(out).astype(outs[0].dtype), lse
