"""Attention of one or a few new tokens to selected pages of a paged cache, by key head.

out_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys s of the listed pages that stand at or
before the position of t. With a few queries a key, 2 G T FLOPs a byte of bfloat16 cache at most,
this is far below every ridge: the floor is bytes of the listed pages / bandwidth.

Layout: kv_pages [pages, H_kv, 2, page, D], keys in plane 0 and values in plane 1, so that what a
list entry means, a page of one key head, is one contiguous copy of both. Or one plane, [pages,
H_kv, 1, page, 2 D], whose rows are a key followed by its value: with D = 64 such a row fills the
128 lanes of a TPU, where two planes would waste half of memory and bandwidth.

Pages are listed by their place in the sequence, so that the position of every key is known: place i
holds the positions i * page to (i + 1) * page - 1, and `block_table` says where it is stored. Each
implementation states its own roofline.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

from pallas_kernels import _sparse_decode_xla as xla
from pallas_kernels._op import KernelOp, choose, vary_alike

NOWHERE = 2**30  # position of the keys of a page that is not there: after every query


def _tpu() -> Any:
    from pallas_kernels import _sparse_decode_tpu  # late: Pallas takes 70 ms to import

    return _sparse_decode_tpu


# Each: (rows [L, T * G, D], kv_pages, lists, positions [B, T], *, scale, logit_softcap, return_lse)
# -> out like rows, and lse [L, T * G] float32 or None, for the L = B * H_kv lists. A Hopper form
# ("gpu") would go here.
IMPLEMENTATIONS = {"xla": xla.attend, "tpu": lambda *a, **k: _tpu().attend(*a, **k)}


class Lists(NamedTuple):
    """The pages that each (sequence, key head) attends to, L = B * H_kv of them.

    Attributes:
        page: int32 `[L, P]`, where a page is stored; always in range.
        start: int32 `[L, P]`, position of its first key; `NOWHERE` for what is no page.
        count: int32 `[L]`, how many entries to read.
    """

    page: jax.Array
    start: jax.Array
    count: jax.Array


def sparse_decode_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_ids: jax.Array,
    page_count: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    logit_softcap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention of a few new tokens to the listed pages of a paged key-value cache.

    For decoding: it has no derivative. New lists, counts, positions and tables of the same shapes
    never recompile. Keys and values after a token's position are not seen by it, whatever they
    hold, NaN included; keys of the new tokens themselves are seen if their page is listed.

    Args:
        q: `[B, T, H, D]`, T new tokens of each sequence.
        kv_pages: `[pages, H_kv, 2, page, D]` of the dtype of q, keys and values; or
            `[pages, H_kv, 1, page, 2 * D]`, each row a key and its value, which a TPU needs for
            D = 64. Query head h reads key head h // (H / H_kv), H a multiple of H_kv.
        page_ids: int `[B, H_kv, P]`, pages by place in the sequence, in any order, none twice. An
            id that is no page of the table, such as -1, is skipped.
        page_count: int `[B, H_kv]`, how many entries of each list to read, from 0 to P.
        block_table: int `[B, max_pages]`, where the pages of each sequence are stored; what is not
            a stored page, such as -1, is skipped.
        positions: int `[B, T]`, the position of each token: it sees the keys up to this one. Equal
            ones let the tokens of a block see each other; a token at -1 sees nothing.
        scale: Of the scores; 1 / sqrt(D) if not given.
        logit_softcap: c in c * tanh(score / c).
        return_lse: Also return the log-sum-exp, to merge with attention to other keys.
        implementation: "tpu" or "xla"; chosen by device if not given.

    Returns:
        `[B, T, H, D]` of the dtype of q, zeros where a token sees no key; with `return_lse` also
        `[B, T, H]` float32, the natural logarithm of the sum of exp(score), -inf there.

    Raises:
        ValueError: If shapes do not fit, or there is no such implementation.
        TypeError: If q and kv_pages differ in dtype, or ids are not integers.
        NotImplementedError: If the device cannot run `implementation`, or under differentiation.

    Example:
        >>> from pallas_kernels import sparse_decode_attention
        >>> cache = jnp.arange(8.0).reshape(4, 1, 2, 1, 1)  # 4 pages of one key, D = 1
        >>> ids, count, table = jnp.array([[[0, 2]]]), jnp.array([[2]]), jnp.arange(4)[None]
        >>> q, last = jnp.zeros((1, 1, 1, 1)), jnp.array([[3]])
        >>> sparse_decode_attention(q, cache, ids, count, table, last)  # the mean of 1 and 5
        Array([[[[3.]]]], dtype=float32)

    Cost: reads the listed pages once, 4 D page bytes each in bfloat16. Memory beyond that: see the
    head of the file of each implementation. Take one call for T tokens only if they share lists;
    else make T sequences of one token.
    """
    choice = choose("sparse_decode_attention", IMPLEMENTATIONS, implementation)
    check(q, kv_pages, page_ids, page_count, block_table, positions)
    (b, t, h, d), kv_heads = q.shape, kv_pages.shape[1]
    if implementation is None and choice == "tpu":
        sizes = *kv_pages.shape[3:], t * h // kv_heads, page_ids.shape[-1]
        choice = "xla" if _tpu().supports(q.dtype, *sizes) else "tpu"
    if isinstance(page_ids, Tracer):
        check_pages(page_ids, page_count, block_table, kv_pages.shape[0])  # for checkify
    if not q.size or not page_ids.size or not kv_pages.size:
        lse = jnp.full((b, t, h), -jnp.inf)
        return (jnp.zeros_like(q), lse) if return_lse else jnp.zeros_like(q)
    operands = vary_alike(q, kv_pages, page_ids, page_count, block_table, positions)
    scale = d**-0.5 if scale is None else scale
    out, lse = _attend(choice, scale, logit_softcap, return_lse, *operands)
    return (out, lse) if return_lse else out


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _attend(
    choice, scale, softcap, return_lse, q, kv_pages, page_ids, page_count, block_table, positions
):
    (b, t, h, d), kv_heads = q.shape, kv_pages.shape[1]
    lists = lists_of(page_ids, page_count, block_table, kv_pages)
    rows = q.reshape(b, t, kv_heads, -1, d).swapaxes(1, 2).reshape(b * kv_heads, -1, d)
    options = {"scale": scale, "logit_softcap": softcap, "return_lse": return_lse}
    out, lse = IMPLEMENTATIONS[choice](
        rows, kv_pages, lists, positions.astype(jnp.int32), **options
    )
    out = out.reshape(b, kv_heads, t, -1, d).swapaxes(1, 2).reshape(q.shape)
    if lse is not None:
        lse = lse.reshape(b, kv_heads, t, -1).swapaxes(1, 2).reshape(b, t, h)
    return out, lse


@_attend.defjvp
def _refuse(choice, scale, softcap, return_lse, primals, tangents):
    raise NotImplementedError(
        "sparse_decode_attention has no derivative, for it is for decoding. Train with attention "
        "over blocks, or stop the gradient: jax.lax.stop_gradient(q), and of kv_pages."
    )


def lists_of(
    page_ids: jax.Array, page_count: jax.Array, block_table: jax.Array, kv_pages: jax.Array
) -> Lists:
    """Where the listed pages are stored and where their keys stand."""
    stored, kv_heads, _, page, _ = kv_pages.shape
    b, _, p = page_ids.shape
    places = block_table.shape[1]
    ids, count = page_ids.astype(jnp.int32), jnp.clip(page_count.astype(jnp.int32), 0, p)
    table = block_table.astype(jnp.int32)
    at = jnp.take_along_axis(table[:, None], jnp.clip(ids, 0, places - 1), 2)
    there = (ids >= 0) & (ids < places) & (at >= 0) & (at < stored)
    there &= jnp.arange(p, dtype=jnp.int32) < count[..., None]
    start = jnp.where(there, ids * page, NOWHERE)
    lists = jnp.where(there, at, 0), start, count
    return Lists(*(a.reshape(b * kv_heads, *a.shape[2:]) for a in lists))


def check(q, kv_pages, page_ids, page_count, block_table, positions) -> None:
    """Raise where shapes or dtypes do not fit."""
    d = q.shape[-1] if q.ndim else 0
    if q.ndim != 4 or kv_pages.ndim != 5 or kv_pages.shape[2::2] not in ((2, d), (1, 2 * d)):
        raise ValueError(
            "q must be [B, T, H, D], and kv_pages [pages, H_kv, 2, page, D] or [pages, H_kv, 1, "
            f"page, 2 * D]; got {q.shape} and {kv_pages.shape}."
        )
    (b, t, h, _), kv_heads = q.shape, kv_pages.shape[1]
    if not kv_heads or h % kv_heads:
        raise ValueError(
            f"the heads of q, {h}, must be a multiple of the {kv_heads} of kv_pages, its axis 1."
        )
    wanted = {
        "page_ids": (page_ids, (b, kv_heads, "P")),
        "page_count": (page_count, (b, kv_heads)),
        "block_table": (block_table, (b, "max_pages")),
        "positions": (positions, (b, t)),
    }
    for name, (array, shape) in wanted.items():
        fits = array.ndim == len(shape) and all(
            isinstance(want, str) or want == size
            for want, size in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} must be [{', '.join(map(str, shape))}] for q {q.shape} and kv_pages "
                f"{kv_pages.shape}; got {array.shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers; got {array.dtype}.")
    if page_ids.shape[-1] and not block_table.shape[-1]:
        raise ValueError("block_table has no page, so that page_ids cannot list any; got P > 0.")
    if q.dtype != kv_pages.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(
            f"q and kv_pages must be of one float dtype; got {q.dtype} and {kv_pages.dtype}. "
            "Convert q; to convert the cache would copy all of it at every token."
        )


def check_pages(
    page_ids: jax.Array, page_count: jax.Array, block_table: jax.Array, pages: int
) -> None:
    """Raise if a list names a page twice, or one that is not there, or is longer than it can be.

    A page named twice would weigh double, and one that is not there is skipped. On the host; under
    `jax.experimental.checkify` also inside jit, and in plain jit it does nothing.

    Args:
        page_ids: int `[B, H_kv, P]`.
        page_count: int `[B, H_kv]`.
        block_table: int `[B, max_pages]`.
        pages: How many pages are stored: `kv_pages.shape[0]`.

    Raises:
        ValueError: Names the list, the entry and the mend.

    Example:
        >>> from pallas_kernels import check_pages
        >>> check_pages(jnp.array([[[2, 0]]]), jnp.array([[2]]), jnp.array([[3, -1, 1]]), 4)
    """
    p, places = page_ids.shape[-1], block_table.shape[-1]
    listed = jnp.arange(p) < page_count[..., None]
    outside = listed & ((page_ids < 0) | (page_ids >= places))
    at = jnp.take_along_axis(block_table[:, None], jnp.clip(page_ids, 0, places - 1), 2)
    free = listed & ~outside & ((at < 0) | (at >= pages))
    # Equal ids are neighbours in order; those not listed are told apart from all others.
    ordered = jnp.sort(jnp.where(listed & ~outside, page_ids, places + jnp.arange(p)), -1)
    twice = jnp.concatenate(
        [jnp.zeros_like(listed[..., :1]), ordered[..., 1:] == ordered[..., :-1]], -1
    )[..., :p]
    rules = (
        ((page_count < 0) | (page_count > p), page_count, f"page_count must be 0 to {p}, the "
         "length of a list", "Make page_ids longer, or the count smaller"),
        (outside, page_ids, f"an id must be 0 to {places - 1}, a place in block_table",
         "Ids are places in the sequence, not in the cache"),
        (free, page_ids, f"block_table must give a listed page a place of 0 to {pages - 1}",
         "Store the page first, or do not list it"),
        (twice, ordered, "a list may name a page once", "A page named twice would weigh double"),
    )  # fmt: skip
    for wrong, values, rule, mend in rules:
        found = jnp.any(wrong)
        if isinstance(found, Tracer):
            checkify.debug_check(~found, rule)
        elif found:
            place = tuple(int(i[0]) for i in jnp.nonzero(wrong))
            raise ValueError(
                f"{rule}; got {int(values[place])} for sequence {place[0]}, head {place[1]}. "
                f"{mend}."
            )


def reference(
    q: jax.Array,
    kv_pages: jax.Array,
    page_ids: jax.Array,
    page_count: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    scale: float | None = None,
    logit_softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same by one dense softmax over all places of the table, in float32; out and lse."""
    (b, _, h, d), (stored, kv_heads, _, page, _) = q.shape, kv_pages.shape
    places = block_table.shape[1]
    lists = lists_of(page_ids, page_count, block_table, kv_pages)
    start = lists.start.reshape(page_ids.shape)
    on = (start[..., None] == jnp.arange(places) * page).any(2)  # [B, H_kv, places]
    cache = [kv_pages[:, :, 0, :, :d], kv_pages[:, :, -1, :, -d:]]
    cache = jnp.concatenate(cache, -1)[jnp.clip(block_table, 0, stored - 1)]
    cache = cache.swapaxes(2, 3).reshape(b, -1, kv_heads, 2 * d).astype(jnp.float32)
    cache = jnp.repeat(cache, h // kv_heads, 2)
    kept = jnp.repeat(jnp.repeat(on, page, 2), h // kv_heads, 1)  # [B, H, S]
    seen = kept[:, :, None] & (jnp.arange(places * page) <= positions[:, None, :, None])
    cache = jnp.where(seen.any(2).swapaxes(1, 2)[..., None], cache, 0.0)
    scores = jnp.einsum(
        "bthd,bshd->bhts", q.astype(jnp.float32), cache[..., :d], precision="highest"
    ) * (d**-0.5 if scale is None else scale)
    if logit_softcap is not None:
        scores = logit_softcap * jnp.tanh(scores / logit_softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, -1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)), 0)
    out = jnp.einsum("bhts,bshd->bthd", weights, cache[..., d:], precision="highest")
    return out, lse[..., 0].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape that every implementation must handle.

    Attributes:
        name: What is special about it.
        batch: Sequences.
        tokens: New tokens of each.
        heads: (H, H_kv).
        d: Size of a head.
        page: Tokens of a page.
        length: Longest sequence; others are shorter.
        entries: Length P of a list; counts go from 0 to P.
        planes: Of the cache, 2 or 1.
        dtype: Of q and the cache.
        softcap: `logit_softcap`.
        tolerance: Largest error over the largest entry of the reference.
    """

    name: str
    batch: int
    tokens: int
    heads: tuple[int, int]
    d: int
    page: int
    length: int
    entries: int
    planes: int = 2
    dtype: str = "float32"
    softcap: float | None = None
    tolerance: float = 1e-5


CASES = (
    Case("one token", 2, 1, (4, 2), 128, 64, 700, 8),
    Case("four tokens, 8 heads a key head", 2, 4, (16, 2), 128, 32, 500, 12),
    Case("D 64, one plane, pages of 16", 3, 2, (6, 2), 64, 16, 333, 17, planes=1),
    Case("D 256, pages of 128", 1, 1, (4, 1), 256, 128, 1000, 5),
    Case("one head each, one page", 2, 1, (2, 2), 128, 128, 100, 1),
    Case("soft cap", 2, 2, (4, 2), 128, 64, 300, 4, softcap=2.0),
    Case("one plane of 256", 2, 1, (4, 2), 128, 32, 200, 4, planes=1),
    Case("bf16", 2, 1, (8, 2), 128, 64, 700, 8, dtype="bfloat16", tolerance=1e-2),
    Case("bf16, one plane", 2, 3, (8, 1), 64, 32, 400, 9, 1, dtype="bfloat16", tolerance=1e-2),
)

OP = KernelOp("sparse_decode_attention", sparse_decode_attention, reference, IMPLEMENTATIONS, CASES)
