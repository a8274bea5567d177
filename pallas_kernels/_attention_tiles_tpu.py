"""Tiles of the TPU kernels of block-sparse attention, the VMEM they take, and what fits none."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._attention_tpu import META, Plan
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_tpu import LANES, tile_room
from pallas_kernels._compat import Tpu, tpu

ROWS = 256  # of queries that share a tile; with fewer, pushing keys to the MXU binds
GATHERED_ROWS = 512  # the same where keys come tile by tile, for FLOPs a byte
MOST_LANES = 4096  # keys of a tile in the forward pass, which waits for their maximum
MOST_LANES_BACKWARD = 2048
MOST_SCALARS = 240_000  # in 1 MiB of SMEM, less what the compiler keeps


def pairs(item: int) -> int:
    """Scores of a tile: 2 MiB; of float32 operands, whose products take 6 passes, 512 KiB."""
    return 2**19 if item == 2 else 2**17


def wide(d: int) -> int:
    """Head width as it is kept: a multiple of the lanes."""
    return -(-d // LANES) * LANES


def row_bytes(plan: Plan, d: int, keys: int, item: int, kernel: str) -> int:
    """VMEM of a kernel over lists of keys: "forward", "mass" or "dq".

    2 blocks each of q, out or dout, and dq; sums; statistics, broadcast over lanes; the keys and
    values of 2 tiles or 2 heads; scores, in float32 and as an operand.
    """
    height, tile, d = plan.heads * plan.own, plan.members * plan.listed, wide(d)
    arrays = {"forward": 2, "mass": 1, "dq": 3}[kernel]
    own = 2 * arrays * height * d * item + (0 if kernel == "mass" else height * d * 4)
    listed = (1 if kernel == "mass" else 2) * 2 * (keys if plan.resident else tile) * d * item
    return own + 2 * height * LANES * 4 + listed + height * tile * (4 + item)


def col_bytes(plan: Plan, d: int, item: int, result: int) -> int:
    """VMEM of dK and dV: 2 blocks of k, v, dk, dv; sums; 2 tiles of q and dout; scores twice."""
    tile, d = plan.members * plan.heads * plan.listed, wide(d)
    own = plan.own * d * (4 * item + 4 * result + 8)
    return own + 4 * tile * d * item + 2 * tile * 8 * 4 + 2 * plan.own * tile * (4 + item)


def _heads(g: int, block: int, most: int) -> int:
    """Heads worked on together: as many as divide G, fill lanes, and make up to `most` rows."""
    fits = [n for n in range(1, g + 1) if g % n == 0 and (n == 1 or n * block <= most)]
    return max(n for n in fits if n == 1 or n * block % LANES == 0)


def _members(height: int, block: int, width: int, item: int, most: int) -> int:
    """Members of a full tile; no more than lists are long."""
    least = 2 if block < LANES else 1
    members = max(least, min(pairs(item) // height, most) // block // least * least)
    return min(members, -(-width // least) * least)


def plan_rows(form: Form, q: Any, k: Any, rows: BlockLists, device: Tpu, kernel: str) -> Plan:
    """The plan of a kernel over lists of keys: "forward", "mass" or "dq".

    Args:
        form: Of the call.
        q: [B, A, G, T, D], or its shape and dtype.
        k: [B, H_kv, S, D].
        rows: Lists by query.
        device: From `tpu`.
        kernel: Which one.
    """
    (b, a, g, t, d), (_, h_kv, s, _) = q.shape, k.shape
    (bq, bkv), item = form.block_size, jnp.dtype(q.dtype).itemsize
    width = rows.index.shape[-1]
    most = MOST_LANES if kernel == "forward" else MOST_LANES_BACKWARD

    def plan(resident: bool) -> Plan:
        heads = _heads(g, bq, ROWS if resident else GATHERED_ROWS)
        return Plan(
            own=bq,
            listed=bkv,
            lists=t // bq,
            units=b * a * g // heads,
            heads=heads,
            members=_members(heads * bq, bkv, width, item, most),
            cores=device.cores,
            resident=resident,
            batch=b,
            chunks=g // heads,
            units_per_head=a // h_kv * g // heads,
        )

    resident = plan(True)
    # Else gathering moves less: few queries that see few of many keys.
    gathered = resident.units_per_head * resident.lists * width * bkv
    fits = row_bytes(resident, d, s, item, kernel) <= tile_room(device)
    return resident if fits and gathered >= 2 * s else plan(False)


def plan_cols(form: Form, q: Any, k: Any, cols: BlockLists, device: Tpu) -> Plan:
    """The plan of the kernel over lists of queries, dK and dV; arguments as in `plan_rows`."""
    (b, a, g, _, _), (_, h_kv, s, _) = q.shape, k.shape
    (bq, bkv), item = form.block_size, jnp.dtype(q.dtype).itemsize
    heads = _heads(g, bq, GATHERED_ROWS)
    return Plan(
        own=bkv,
        listed=bq,
        lists=s // bkv,
        units=b * a * g // heads,
        heads=heads,
        members=_members(bkv, heads * bq, cols.index.shape[-1], item, MOST_LANES_BACKWARD),
        cores=device.cores,
        by_key=True,
        batch=b,
        chunks=g // heads,
        units_per_head=a // h_kv * g // heads,
    )


def supports(form: Form, q: Any, k: Any, rows: BlockLists, cols: BlockLists, extras: Extras) -> str:
    """Why the kernels cannot take such operands, or "" if they can; see `plan_rows`."""
    biased = extras.bias is not None
    (bq, bkv), dtype = form.block_size, jnp.dtype(q.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16; got {dtype}"
    for block in (bq, bkv):
        if block != LANES // 2 and block % LANES:
            return f"the TPU kernels need blocks of 64 or a multiple of {LANES}; got {bq} x {bkv}"
    device, d, item = tpu(), q.shape[-1], dtype.itemsize
    plans = [plan_rows(form, q, k, rows, device, kernel) for kernel in ("forward", "dq")]
    plans.append(plan_cols(form, q, k, cols, device))
    for plan, lists in zip(plans, (rows, rows, cols), strict=True):
        width = lists.index.shape[-1]
        # Twice: this list and the next one, and, a head, its bias and sums of its entries.
        scalars = 4 * (META + width) + 2 * plan.heads * width * (1 + biased)
        if scalars > MOST_SCALARS:
            return (
                f"the TPU kernels hold lists of {width} blocks{' and their bias' if biased else ''}"
                f" in scalar memory; that takes {scalars} integers, and there are {MOST_SCALARS}"
            )
    most = max(
        row_bytes(plans[0], d, k.shape[2], item, "forward"),
        row_bytes(plans[1], d, k.shape[2], item, "dq"),
        col_bytes(plans[2], d, item, 4),
    )
    if extras.q_segments is not None:  # of the listed side, twice
        most += 8 * max(q.shape[3], k.shape[2]) * LANES // min(bq, bkv, LANES)
    if most > tile_room(device):
        return (
            f"the TPU kernels take {most} bytes of VMEM for blocks of {bq} x {bkv} and heads of "
            f"{d}, and there are {tile_room(device)}"
        )
    return ""
