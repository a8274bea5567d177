"""Block-sparse attention on TPU: the forward pass and block mass, over tiles of key blocks.

A grid step takes the query blocks of up to `heads` heads that share a list and a key-value head,
as the rows of one product with a tile of `members` key blocks; see `_attention_tpu.py` for how
tiles come. Softmax is online, in base 2; sums are in float32.

FLOPs 4 rows keys D a tile. Bytes 4 keys D a tile in bfloat16 where keys are gathered, so that a
step gives `rows` FLOPs a byte; where they are resident they are read once a head. At least 256
rows or resident keys therefore, for the ridges of v5e and v6e are 240 and 561 FLOPs a byte, and
attention reaches a third of the latter. VMEM: `_attention_tiles_tpu.py`. Backward:
`_block_sparse_attention_backward_tpu.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _attention_tpu as shared
from pallas_kernels._attention_launch_tpu import by_list, from_list, launch
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._attention_step_tpu import Part, Step
from pallas_kernels._attention_tiles_tpu import plan_rows
from pallas_kernels._attention_tpu import LOG2E, MASKED, Plan, head_blocks, tokens
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_tpu import LANES
from pallas_kernels._compat import tpu


def _forward_kernel(
    step: Step, q_ref: Any, out_ref: Any, lse_ref: Any, top: Any, mass: Any, total: Any
):
    top[...] = jnp.full_like(top, MASKED)
    mass[...] = jnp.zeros_like(mass)
    total[...] = jnp.zeros_like(total)
    c = shared.factor(step.form, step.biased)

    def work(parts, listed):
        k, v = listed
        # All products with keys come first: those of a part hide the exponentials of another.
        products = [shared.product(q_of(q_ref, part), k[part.lanes], 1) for part in parts]
        for part, scores in zip(parts, products, strict=True):
            add(part, step.logits(scores, part)[0], v[part.lanes])

    def add(part, scores, v):
        old = top[part.rows]
        new = jnp.maximum(old, jnp.max(scores, 1, keepdims=True))
        weights, shrink = jnp.exp2(scores * c - new[:, :1] * c), jnp.exp2((old - new) * c)
        mass[part.rows] = shrink * mass[part.rows] + jnp.sum(weights, 1, keepdims=True)
        top[part.rows] = new
        values = shared.product(weights.astype(v.dtype), v, 0)
        total[part.rows] = total[part.rows] * shrink[:, :1] + values

    step.walk(work)
    # A row that saw no key has equal weights, those of what was masked.
    seen = top[...] > MASKED / 2
    whole = jnp.where(seen, mass[...], 1.0)
    out = jnp.where(seen[:, :1], total[...] / whole[:, :1], 0.0)
    out_ref[...] = out.astype(out_ref.dtype).reshape(out_ref.shape)
    lse = jnp.where(seen, top[...] * (c / LOG2E) + jnp.log2(whole) / LOG2E, -jnp.inf)
    lse_ref[...] = lse.T[:1]


def _mass_kernel(step: Step, q_ref: Any, lse_ref: Any, out_ref: Any):
    clear(out_ref)
    c = shared.factor(step.form, step.biased)
    lse = shared.column(lse_ref[...])[:, :1]

    def work(parts, listed):
        (k,) = listed
        for part in parts:
            scores = shared.product(q_of(q_ref, part), k[part.lanes], 1)
            scores, _ = step.logits(scores, part)
            sums_of_entries(step, part, jnp.exp2(scores * c - lse[part.rows]), out_ref)

    step.walk(work)


def q_of(ref: Any, part: Part) -> jax.Array:
    """Rows of the heads of a part, [heads * own, D]."""
    return ref[part.heads].reshape(-1, ref.shape[-1])


def clear(out_ref: Any) -> None:
    """Zero a row of scalars."""

    def one(at: Any, _: Any) -> None:
        out_ref[0, 0, at] = jnp.float32(0)

    lax.fori_loop(0, out_ref.shape[-1], one, None)


def sums_of_entries(step: Step, part: Part, x: jax.Array, out_ref: Any) -> None:
    """Write the sums over each head and entry of x [heads * own, lanes] to scalar memory."""
    own, width, tile = step.plan.own, step.plan.listed, part.tile
    places = out_ref.shape[-1] // step.plan.heads
    for at, head in enumerate(range(part.heads.start, part.heads.stop)):
        line = jnp.sum(x[at * own : (at + 1) * own], 0, keepdims=True)
        for member in range(tile.size):
            total = jnp.sum(line[:, member * width : (member + 1) * width])

            @pl.when(tile.live(member))
            def _(total=total, head=head, member=member):
                out_ref[0, 0, head * places + tile.place(member)] = total


def forward(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: BlockLists,
    extras: Extras,
    *,
    plan: Plan | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention: out [B, A, G, T, D] and lse [B, A, G, T], -inf where a query saw no key."""
    plan = plan or plan_rows(form, q, k, rows, tpu(), "forward")
    d = q.shape[-1]
    q_, k_, v_ = tokens(q, plan), head_blocks(k, plan.listed), head_blocks(v, plan.listed)
    height, width = plan.heads * plan.own, q_.shape[-1]
    pairs = plan.total * height * rows.index.shape[-1] * plan.listed
    out, lse = launch(
        _forward_kernel,
        form,
        plan,
        rows,
        extras,
        [(k_, "head"), (v_, "head")],
        [(q_, "tokens")],
        [(q_.shape, q.dtype, "tokens"), ((plan.total, 1, height), jnp.float32, "list")],
        [pltpu.VMEM((height, n), jnp.float32) for n in (LANES, LANES, width)],
        pl.CostEstimate(
            flops=4 * pairs * d,
            bytes_accessed=2 * (q_.nbytes + k_.nbytes),
            transcendentals=pairs,
        ),
        "block_sparse_attention",
        interpret,
    )
    return out[..., :d].reshape(q.shape), from_list(
        lse, plan, (*q.shape[:3], -1, plan.own)
    ).reshape(q.shape[:4])


def mass(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    rows: BlockLists,
    extras: Extras,
    *,
    plan: Plan | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Sums of exp(score - lse) over the keys of each entry and the queries: [B, A, G, R, W]."""
    plan = plan or plan_rows(form, q, k, rows, tpu(), "mass")
    q_, k_ = tokens(q, plan), head_blocks(k, plan.listed)
    entries = rows.index.shape[-1]
    pairs = plan.total * plan.heads * plan.own * entries * plan.listed
    # Rows past the end of the queries give no mass, as those that see nothing.
    real = jnp.arange(lse.shape[-1]) < form.shape[0]
    stats = jnp.where(real & (lse > -jnp.inf), lse * LOG2E, -MASKED)
    (sums,) = launch(
        _mass_kernel,
        form,
        plan,
        rows,
        extras,
        [(k_, "head")],
        [(q_, "tokens"), (by_list(stats.reshape(*lse.shape[:3], -1, plan.own), plan), "list")],
        [((plan.total, 1, plan.heads * entries), jnp.float32, "scalars")],
        [],
        pl.CostEstimate(
            flops=2 * pairs * q_.shape[-1],
            bytes_accessed=q_.nbytes + k_.nbytes,
            transcendentals=pairs,
        ),
        "block_sparse_attention_mass",
        interpret,
    )
    return from_list(sums, plan, (*q.shape[:3], plan.lists, entries))
