"""Problems that every implementation of block-sparse attention must handle, and their answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._block_mask import BlockMask


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_mask: BlockMask,
    *,
    causal: bool = False,
    q_offset: int | jax.Array = 0,
    segment_ids: Any = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    bias_per_block: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out, lse, mass) by a dense softmax, in float32 at the highest precision."""
    (b, t, h, d), (s, h_kv) = q.shape, k.shape[1:3]
    (bq, bkv), (rows, cols) = block_mask.block_size, block_mask.grid
    q_, k_, v_ = (x.astype(jnp.float32) for x in (q, k, v))
    k_, v_ = (jnp.repeat(x, h // h_kv, 2) for x in (k_, v_))
    scores = jnp.einsum("bthd,bshd->bhts", q_, k_, precision="highest")
    scores *= d**-0.5 if scale is None else scale
    if logit_softcap is not None:
        scores = logit_softcap * jnp.tanh(scores / logit_softcap)
    if bias_per_block is not None:
        wide = jnp.repeat(jnp.repeat(bias_per_block, bq, 2), bkv, 3)[:, :, :t, :s]
        scores += wide.astype(jnp.float32)
    seen = jnp.repeat(block_mask.todense(), h // block_mask.heads, 1)
    if causal:
        at = jnp.arange(t) + jnp.atleast_1d(jnp.asarray(q_offset))[:, None]
        seen &= (jnp.arange(s) <= at[..., None])[:, None]
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        seen &= (pair[0][:, :, None] == pair[1][:, None])[:, None]
    any_ = seen.any(-1, keepdims=True)
    scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(jnp.where(any_, scores, 0.0), -1, keepdims=True)
    p = jnp.where(seen & any_, jnp.exp(jnp.where(seen, scores, 0.0) - lse), 0.0)
    out = jnp.einsum("bhts,bshd->bthd", p, v_, precision="highest")
    lse = jnp.where(any_, lse, -jnp.inf)[..., 0].swapaxes(1, 2)
    padded = jnp.pad(p, ((0, 0), (0, 0), (0, rows * bq - t), (0, cols * bkv - s)))
    sums = padded.reshape(b, h, rows, bq, cols, bkv).sum((3, 5))
    mass = sums / jnp.minimum(bq, t - bq * jnp.arange(rows))[:, None]
    return out.astype(q.dtype), jnp.broadcast_to(lse, (b, t, h)), mass


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem that every implementation must handle.

    Attributes:
        name: What is special about it.
        shape: (T, S).
        heads: (H, H_kv).
        mask_heads: A.
        d: Head width.
        block: (bq, bkv).
        density: Share of blocks listed.
        options: `causal`, `window`, `segments`, `softcap`, `bias`, `offset`, `empty rows`.
        batch: B; the mask has as many entries if `batched`.
        dtype: Of q, k and v.
        tolerance: Largest error over the largest entry of the reference.
    """

    name: str
    shape: tuple[int, int]
    heads: tuple[int, int]
    mask_heads: int
    d: int = 64
    block: tuple[int, int] = (128, 128)
    density: float = 0.5
    options: tuple[str, ...] = ()
    batch: int = 1
    batched: bool = False
    dtype: str = "float32"
    tolerance: float = 2e-5


CASES = (
    Case("causal", (384, 384), (2, 2), 1, options=("causal",)),
    Case("a mask a head, 128 wide", (256, 256), (2, 1), 2, 128, options=("causal",)),
    Case("a mask a group, 256 wide", (256, 256), (4, 2), 2, 256),
    Case("blocks of 64, ragged", (200, 330), (4, 2), 1, block=(64, 64), options=("bias",)),
    Case(
        "uneven blocks, offset",
        (128, 320),
        (2, 1),
        1,
        block=(64, 128),
        options=("causal", "offset"),
    ),
    Case(
        "a mask an entry, segments",
        (256, 256),
        (2, 2),
        2,
        options=("segments",),
        batch=2,
        batched=True,
    ),
    Case("window, soft cap", (384, 384), (2, 2), 1, options=("window", "softcap")),
    Case(
        "empty rows and columns",
        (384, 384),
        (2, 2),
        2,
        density=0.2,
        options=("causal", "empty rows"),
    ),
    Case("full", (256, 256), (1, 1), 1, density=1.0),
    Case("nothing listed", (256, 256), (1, 1), 1, density=0.0),
    Case("bf16", (384, 384), (4, 2), 2, 128, options=("causal",), dtype="bfloat16", tolerance=2e-2),
)
