"""How the TPU kernels of block-sparse attention are called.

They differ in which side owns the lists: blocks of queries that list keys (forward, block mass,
dQ), or blocks of keys that list queries (dK and dV).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _attention_tpu as shared
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._attention_step_tpu import Step
from pallas_kernels._attention_tpu import Plan
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_tpu import compiler_params
from pallas_kernels._compat import tpu
from pallas_kernels._op import vary_alike


def launch(
    kernel: Callable[..., None],
    form: Form,
    plan: Plan,
    lists: BlockLists,
    extras: Extras,
    listed: list[tuple[jax.Array, str]],
    operands: list[tuple[jax.Array, str]],
    results: list[tuple[tuple[int, ...], Any, str]],
    scratch: list[Any],
    cost: pl.CostEstimate,
    name: str,
    interpret: Any,
) -> Any:
    """Call `kernel(Step, *operands, *results, *scratch)` for each list.

    Args:
        kernel: The body.
        form: Of the call.
        plan: How it is cut.
        lists: By query, or by key.
        extras: Segments and bias, if there are any; the latter in the order of the lists.
        listed: Arrays of the listed side, and how a block is picked: "head" `[B * H_kv, blocks,
            ...]`, "heads" `[units, heads, blocks, ...]`, "unit" `[units, blocks, ...]`.
        operands: Arrays of the own side and how they are cut, see `_block`.
        results: Shapes, dtypes and how they are cut.
        scratch: Of the body.
        cost: For the scheduler of XLA.
        name: Of the kernel.
        interpret: See `pallas_call`.
    """
    a = plan.units // plan.batch // plan.chunks
    table = shared.packed(lists, extras.offset)
    inputs: list[jax.Array] = []
    specs: list[pl.BlockSpec] = []

    def add(array: jax.Array, spec: pl.BlockSpec) -> None:
        inputs.append(array)
        specs.append(spec)

    def row_of(line: Any) -> Any:
        """Row of the table that a list is in."""
        unit, heads = lax.div(line, plan.lists), table.shape[1]
        head = lax.div(unit, plan.chunks)
        b = lax.div(head, a) if table.shape[0] > 1 else 0
        mask_head = lax.div(lax.rem(head, a) * heads, a)
        return (b * heads + mask_head) * plan.lists + lax.rem(line, plan.lists)

    entries = table.reshape(-1, 1, table.shape[-1])
    for ahead in (0,) if plan.resident else (0, 1):
        place = lambda core, step, ahead=ahead: (row_of(plan.at(core, step + ahead)), 0, 0)  # noqa: E731
        block = (1, 1, entries.shape[-1])
        add(entries, pl.BlockSpec(block, place, memory_space=pltpu.SMEM))
    if extras.bias is not None:
        bias = by_list(extras.bias, plan)
        add(bias, _block(plan, bias.shape, "scalars"))
    if extras.q_segments is not None and extras.k_segments is not None:
        own_ids, ids = extras.q_segments, extras.k_segments
        own_ids, ids = (ids, own_ids) if plan.by_key else (own_ids, ids)
        many = ids.shape[0] > 1 or own_ids.shape[0] > 1
        own_ids, ids = (
            jnp.broadcast_to(x, (plan.batch if many else 1, x.shape[1])) for x in (own_ids, ids)
        )
        ids = ids.reshape(ids.shape[0], -1, plan.listed)

        def entry(line: Any) -> Any:
            return lax.div(line, plan.total // plan.batch) if many else 0

        def own_place(core: Any, step: Any) -> Any:
            line = plan.at(core, step)
            return entry(line) * plan.lists + lax.rem(line, plan.lists), 0, 0

        add(own_ids.reshape(-1, 1, plan.own), pl.BlockSpec((None, 1, plan.own), own_place))
        place = lambda core, step: (entry(plan.at(core, step)), 0, 0)  # noqa: E731
        add(ids, pl.BlockSpec((None, *ids.shape[1:]), place))
    for array, _ in listed:
        add(array, pl.BlockSpec(memory_space=pl.ANY))
    for array, how in operands:
        add(array, _block(plan, array.shape, how))
    inputs = list(vary_alike(*inputs))
    like = jax.typeof(inputs[0]).manual_axis_type
    buffers = []
    for array, pick in listed:
        block = (plan.heads, *array.shape[3:]) if pick == "heads" else array.shape[2:]
        many = array.shape[1] if plan.resident else plan.members
        buffers.append(pltpu.VMEM((2, many, *block), array.dtype))

    def body(*refs: Any) -> None:
        step = Step(form, plan, extras, [pick for _, pick in listed], refs)
        kernel(step, *step.rest)

    return pl.pallas_call(
        body,
        grid=(plan.cores, plan.per_core),
        in_specs=specs,
        out_specs=[_block(plan, shape, how) for shape, _, how in results],
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=like) for shape, dtype, _ in results
        ],
        scratch_shapes=[
            *scratch,
            *buffers,
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=compiler_params(tpu(), 2),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*inputs)


def by_list(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, A, G, lists, n] as one row a list: [all lists, 1, heads * n]."""
    lists, n = x.shape[-2:]
    x = x.reshape(-1, plan.heads, lists, n).swapaxes(1, 2)
    return x.reshape(-1, 1, plan.heads * n)


def from_list(x: jax.Array, plan: Plan, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `by_list`; `shape` is [B, A, G, lists, n]."""
    return x.reshape(-1, plan.lists, plan.heads, shape[-1]).swapaxes(1, 2).reshape(shape)


def _block(plan: Plan, shape: tuple[int, ...], how: str) -> pl.BlockSpec:
    """How an array is cut for a list.

    "tokens" `[units, heads, T, D]`; "head" `[B * H_kv, S, D]`; "unit" `[units, S, D]`; "list"
    `[lists, 1, n]`; "scalars" the same, in scalar memory.
    """

    def place(core: Any, step: Any) -> Any:
        line = plan.at(core, step)
        unit, own = lax.div(line, plan.lists), lax.rem(line, plan.lists)
        if how in ("list", "scalars"):
            return line, 0, 0
        if how == "tokens":
            return unit, 0, own, 0
        return lax.div(unit, plan.units_per_head) if how == "head" else unit, own, 0

    if how == "scalars":
        return pl.BlockSpec((1, 1, shape[-1]), place, memory_space=pltpu.SMEM)
    if how == "list":
        return pl.BlockSpec((None, 1, shape[-1]), place)
    heads = (shape[1],) if how == "tokens" else ()
    return pl.BlockSpec((None, *heads, plan.own, shape[-1]), place)
