"""Attention over listed blocks of keys: forward, dQ, dK and dV at the kept blocks only.

For scores s = scale q k^T, p = softmax over the allowed keys, o = p v; backward with
D = rowsum(do * o): dv = p^T do, ds = p (do v^T - D), dq = ds k, dk = ds^T q. A kept block of
bq x bkv costs 4 bq bkv D FLOPs forward and 10 backward. Nothing is of the size T x S.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _block_sparse_attention_gradient_xla as xla_gradient
from pallas_kernels import _block_sparse_attention_xla as xla
from pallas_kernels._attention_cases import CASES, reference
from pallas_kernels._attention_plan import Extras, Form, of_entries, refined, to_map
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_mask import BlockMask
from pallas_kernels._op import KernelOp, choose


class Implementation(NamedTuple):
    """What an implementation is made of; shapes as in `_attention_plan.py`.

    Attributes:
        forward: (form, q [B, A, G, T, D], k [B, H_kv, S, D], v, rows, extras) ->
            out [B, A, G, T, D], lse [B, A, G, T].
        backward: (form, q, k, v, lse, dout, delta, rows, cols, extras) -> dq, dk, dv and the
            gradient of `extras.bias`, or None; delta [B, A, G, T] = sum(out * dout) - dlse.
        mass: (form, q, k, lse, rows, extras) -> [B, A, G, R, W], the sum of exp(score - lse) over
            the queries and keys of each entry; 0 past the count.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    mass: Callable[..., Any]


def _tpu() -> Any:
    from pallas_kernels import _block_sparse_attention_backward_tpu  # late: Pallas takes 70 ms

    return _block_sparse_attention_backward_tpu


def _gpu() -> Any:
    from pallas_kernels import _block_sparse_attention_gpu  # late: Mosaic GPU needs absl-py

    return _block_sparse_attention_gpu


IMPLEMENTATIONS = {
    "xla": Implementation(xla.forward, xla_gradient.backward, xla.mass),
    "tpu": Implementation(
        lambda *a: _tpu().forward(*a), lambda *a: _tpu().backward(*a), lambda *a: _tpu().mass(*a)
    ),
    "gpu": Implementation(lambda *a: _gpu().forward(*a), lambda *a: _gpu().backward(*a), xla.mass),
}


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_mask: BlockMask,
    *,
    causal: bool = False,
    q_offset: int | jax.Array = 0,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    bias_per_block: jax.Array | None = None,
    return_lse: bool = False,
    return_block_mass: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention in which each block of queries sees the key blocks that a mask lists.

    Differentiable in q, k, v, `bias_per_block` and through all that is returned. A query that may
    see no key gets zeros, and gives no gradient. A new mask of the same sizes never recompiles.

    Args:
        q: `[B, T, H, D]`.
        k: `[B, S, H_kv, D]`; H_kv divides H, query head h uses head h H_kv // H (GQA).
        v: `[B, S, H_kv, D]`.
        block_mask: For T queries and S keys, of 1 or B batch entries, and of A heads such that A
            divides H and one of A and H_kv divides the other.
        causal: Also hide key s from query t where s > t + q_offset.
        q_offset: Integer scalar or `[B]`, may be traced: position of the first query among keys.
        segment_ids: Integers `[B, T]` (if T = S), or a pair `[B, T]`, `[B, S]`: a query sees only
            keys of its own segment. B may be 1.
        scale: Of the scores; D ** -0.5 if not given.
        logit_softcap: c: the scores become c tanh(score / c).
        bias_per_block: `[B or 1, H or 1, R, C]`, added to all scores of a block, after the cap.
        return_lse: Also return the logarithm of the sum of exponentials, for `merge_attention`.
        return_block_mass: Also return how much of its attention a query block gives to each block.
        implementation: "tpu", "gpu" or "xla"; chosen by device if not given.

    Returns:
        out `[B, T, H, D]` of the dtype of q; then, if asked for, lse float32 `[B, T, H]`, -inf
        where nothing is seen; then mass float32 `[B, H, R, C]`, the mean over the queries of a
        block of the probability they give to the keys of a block (rows sum to 1, or to the share of
        queries that see a key).

    Raises:
        ValueError: If shapes do not fit, or there is no such implementation.
        NotImplementedError: If the device cannot run `implementation`.

    Example:
        >>> from pallas_kernels import BlockMask, Window, block_sparse_attention
        >>> q = k = v = jnp.ones((1, 4, 2, 8))
        >>> mask = BlockMask.from_rule(Window(1, 0), (4, 4), (2, 2))
        >>> block_sparse_attention(q, k, v, mask, causal=True).shape
        (1, 4, 2, 8)

    Cost: 4 D FLOPs a pair of tokens in listed blocks forward, 10 D backward; memory beyond inputs
    and outputs is O(B H (T + R C)). The mass is a second pass over the scores.
    """
    choice = choose("block_sparse_attention", IMPLEMENTATIONS, implementation)
    check(q, k, v, block_mask)
    b, t, h, d = q.shape
    s, h_kv = k.shape[1:3]
    (bq, bkv), (rows, cols) = block_mask.block_size, block_mask.grid
    units = max(block_mask.heads, h_kv)
    form = Form(
        (bq, bkv),
        (t, s),
        block_mask.rules,
        causal,
        d**-0.5 if scale is None else float(scale),
        None if logit_softcap is None else float(logit_softcap),
    )
    offset = jnp.atleast_1d(jnp.asarray(q_offset, jnp.int32))
    if offset.shape not in ((1,), (b,)):
        raise ValueError(f"q_offset must be a scalar or of shape ({b},); got {offset.shape}.")
    extras = Extras(offset if causal else jnp.zeros(1, jnp.int32))
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        for ids, length, name in zip(pair, (t, s), ("queries", "keys"), strict=True):
            if ids.ndim != 2 or ids.shape[0] not in (1, b) or ids.shape[1] != length:
                raise ValueError(
                    f"segment_ids of the {name} must be [{b} or 1, {length}]; got {ids.shape}."
                )
        q_ids, k_ids = (
            jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, pad)), mode="edge")
            for ids, pad in zip(pair, (rows * bq - t, cols * bkv - s), strict=True)
        )
        extras = extras._replace(q_segments=q_ids, k_segments=k_ids)
    by_query, by_key = refined(block_mask, form, extras)
    if bias_per_block is not None:
        shape = bias_per_block.shape
        if (
            len(shape) != 4
            or shape[0] not in (1, b)
            or shape[1] not in (1, h)
            or shape[2:]
            != (
                rows,
                cols,
            )
        ):
            raise ValueError(
                f"bias_per_block must be [{b} or 1, {h} or 1, {rows}, {cols}]; got {shape}."
            )
        bias = jnp.broadcast_to(bias_per_block.astype(jnp.float32), (b, h, rows, cols))
        bias = bias.reshape(b, units, h // units, rows, cols)
        extras = extras._replace(
            bias=of_entries(bias, by_query),
            # Its gradient is that of `bias`, which says all.
            key_bias=jax.lax.stop_gradient(of_entries(bias.swapaxes(-1, -2), by_key)),
        )
    q_ = _padded(q, rows * bq).swapaxes(1, 2).reshape(b, units, h // units, rows * bq, d)
    k_, v_ = (_padded(x, cols * bkv).swapaxes(1, 2) for x in (k, v))
    choice = _fitting(choice, implementation, form, q_, k_, by_query, by_key, extras)
    attended: Any = _attention(choice, form, q_, k_, v_, by_query, by_key, extras)
    out, lse = attended
    results = [out.reshape(b, h, rows * bq, d).swapaxes(1, 2)[:, :t]]
    if return_lse:
        results.append(lse.reshape(b, h, rows * bq).swapaxes(1, 2)[:, :t])
    if return_block_mass:
        sums: Any = _mass(choice, form, q_, k_, lse, by_query, by_key, extras)
        real = jnp.minimum(bq, t - bq * jnp.arange(rows))[:, None].astype(sums.dtype)
        results.append(to_map(sums, by_query, cols).reshape(b, h, rows, cols) / real)
    return results[0] if len(results) == 1 else tuple(results)


def check(q: jax.Array, k: jax.Array, v: jax.Array, mask: BlockMask) -> None:
    """Raise ValueError where shapes do not fit."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be [B, T, H, D], k and v [B, S, H_kv, D]; got {q.shape}, {k.shape}, {v.shape}."
        )
    (b, t, h, d), (_, s, h_kv, _) = q.shape, k.shape
    if k.shape[0] != b or k.shape[3] != d or h % h_kv:
        raise ValueError(
            "q and k must agree in batch and head width, and the heads of k divide those of q; got "
            f"{q.shape} and {k.shape}."
        )
    if mask.shape != (t, s):
        raise ValueError(
            f"the mask is for {mask.shape[0]} queries and {mask.shape[1]} keys; q and k have {t} "
            f"and {s}. Make a mask of shape=({t}, {s})."
        )
    a, batch = mask.heads, mask.by_query.index.shape[0]
    if batch not in (1, b):
        raise ValueError(f"the mask has {batch} batch entries; it must have 1 or {b}.")
    if h % a or (a % h_kv and h_kv % a):
        raise ValueError(
            f"the mask has {a} heads: they must divide the {h} query heads, and divide or be a "
            f"multiple of the {h_kv} key-value heads."
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(
            f"q, k and v must have one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}."
        )


def _fitting(choice: str, asked: str | None, *problem: Any) -> str:
    """`choice`, or "xla", with a warning, where its kernels cannot take the problem."""
    kernels = {"tpu": _tpu, "gpu": _gpu}
    reason = kernels[choice]().supports(*problem) if choice in kernels else ""
    if reason and asked is not None:
        raise NotImplementedError(f"block_sparse_attention: {reason}. Take implementation='xla'.")
    if reason:
        warnings.warn(f"implementation='xla' is taken here, for {reason}", stacklevel=3)
    return "xla" if reason else choice


def _padded(x: jax.Array, length: int) -> jax.Array:
    """Axis 1 padded with zeros to `length`."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _folded(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which under vmap is one call of more batch entries. Every leaf begins with B or 1."""

    @jax.custom_batching.custom_vmap
    def call(*operands: Any) -> Any:
        return run(*operands)

    @call.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> Any:
        b = operands[0].shape[1 if batched[0] else 0]

        def fold(x: jax.Array, mapped: bool) -> jax.Array:
            if not mapped and x.shape[0] == 1:
                return x
            x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.broadcast_to(x, (size, b, *x.shape[2:]))
            return x.reshape(size * b, *x.shape[2:])

        leaves, tree = jax.tree.flatten(operands)
        # q says how many batch entries there are, so it never stays at 1.
        mapped = jax.tree.leaves(batched)
        if not mapped[0]:
            leaves[0], mapped[0] = jnp.broadcast_to(leaves[0], (size, *leaves[0].shape)), True
        results = call(*jax.tree.unflatten(tree, list(map(fold, leaves, mapped))))
        split = lambda x: x.reshape(size, b, *x.shape[1:])  # noqa: E731
        return jax.tree.map(split, results), jax.tree.map(lambda _: True, results)

    return call


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    choice: str,
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    by_query: BlockLists,
    by_key: BlockLists,
    extras: Extras,
) -> tuple[jax.Array, jax.Array]:
    return _attention_of(choice, form, q, k, v, by_query, extras)


def _attention_of(choice, form, q, k, v, by_query, extras):
    return _folded(partial(IMPLEMENTATIONS[choice].forward, form))(q, k, v, by_query, extras)


def _attention_forward(choice, form, q, k, v, by_query, by_key, extras):
    out, lse = attended = _attention_of(choice, form, q, k, v, by_query, extras)
    return attended, (q, k, v, by_query, by_key, extras, out, lse)


def _attention_backward(choice, form, saved, gradients):
    q, k, v, by_query, by_key, extras, out, lse = saved
    dout, dlse = gradients
    b, a, g, t, d = q.shape
    # Summed in the layout in which callers hold them: no transposed copy on a CPU.
    by_token = (x.astype(lse.dtype).reshape(b, a * g, t, d).swapaxes(1, 2) for x in (out, dout))
    delta = jnp.sum(jnp.multiply(*by_token), -1).swapaxes(1, 2).reshape(lse.shape)
    delta = jnp.where(lse == -jnp.inf, 0, delta - dlse)
    run = _folded(partial(IMPLEMENTATIONS[choice].backward, form))
    dq, dk, dv, dbias = run(q, k, v, lse, dout, delta, by_query, by_key, extras)
    return dq, dk, dv, None, None, Extras(None, None, None, dbias, None)  # pyright: ignore


_attention.defvjp(_attention_forward, _attention_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mass(
    choice: str,
    form: Form,
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    by_query: BlockLists,
    by_key: BlockLists,
    extras: Extras,
) -> jax.Array:
    run = partial(IMPLEMENTATIONS[choice].mass, form)
    return _folded(run)(q, k, lse, by_query, extras)


def _mass_forward(choice, form, q, k, lse, by_query, by_key, extras):
    sums = _mass(choice, form, q, k, lse, by_query, by_key, extras)
    return sums, (q, k, lse, by_query, by_key, extras)


def _mass_backward(choice, form, saved, dmass):
    """In plain JAX for every implementation."""
    q, k, lse, by_query, by_key, extras = saved
    run = _folded(partial(xla_gradient.mass_backward, form))
    dq, dk, dlse, dbias = run(q, k, lse, dmass, by_query, by_key, extras)
    return dq, dk, dlse, None, None, Extras(None, None, None, dbias, None)  # pyright: ignore


_mass.defvjp(_mass_forward, _mass_backward)


OP = KernelOp("block_sparse_attention", block_sparse_attention, reference, IMPLEMENTATIONS, CASES)
