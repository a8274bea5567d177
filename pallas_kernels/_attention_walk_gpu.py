"""How the Hopper kernels of block-sparse attention cut their work: tiles, lists, and their steps.

A CTA has one warpgroup that fetches with TMA and two that multiply with wgmma, 64 rows each. It
does one piece of work: the list of a block of queries (forward, dQ) or of keys (dK and dV). The
two warpgroups walk one list together, or each its own list of the same unit. Lists of a unit are
taken longest first, so that CTAs end at about the same time and those that run side by side read
the keys of one head from L2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_gpu import SHARED_MEMORY, divide
from pallas_kernels._compat import rule_runs_in_gpu_kernel

ROWS = 64  # of a wgmma
GROUPS = 2  # warpgroups that multiply
MOST_STAGES = 4
BARRIERS = 1536  # bytes set aside for them, and for alignment


def supports(form: Form, q: jax.Array, *_: Any) -> str:
    """Why the kernels cannot take a problem, or "" if they can."""
    dtype, d = q.dtype, q.shape[-1]
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the GPU kernels take bfloat16 and float16; got {jnp.dtype(dtype)}"
    if d not in (64, 128, 256):
        return f"the GPU kernels take heads 64, 128 or 256 wide; got {d}"
    if any(size not in (64, 128) for size in form.block_size):
        return f"the GPU kernels take blocks of 64 or 128 tokens; got {form.block_size}"
    if d == 256 and form.block_size[0] == ROWS and q.shape[2] % 2:
        return (
            "with heads 256 wide and blocks of 64 queries the GPU kernels take an even number of "
            f"query heads a list and key head; got {q.shape[2]}"  # shared memory for dQ
        )
    for rule in form.rules:
        if not rule_runs_in_gpu_kernel(rule):
            return f"the rule {rule} has an operation that Mosaic GPU lacks"
    return ""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel cuts its work.

    Attributes:
        tile: Keys of a step, or queries of one for dK and dV: 64 or 128.
        stages: Buffers of a ring.
        parts: Of 64 rows, of one block: 2 if the warpgroups share a block of 128.
        heads: 2 if the warpgroups take two heads of a unit.
        lines: 2 if each warpgroup has its own list.
        roles: Whether the warpgroups take one tile and sum one of dK and dV each.
    """

    tile: int
    stages: int
    parts: int = 1
    heads: int = 1
    lines: int = 1
    roles: bool = False


def shared_bytes(config: Config, d: int, own: int, floats: int, ring_floats: int) -> int:
    """Shared memory of a kernel, less barriers.

    Args:
        config: See `Config`.
        d: Head width.
        own: Tiles `[64, d]` of 16 bits that each warpgroup (or pair, with `roles`) holds.
        floats: Arrays of 64 float32 that each warpgroup holds.
        ring_floats: Arrays of `tile` float32 in a stage, beside its two tiles `[tile, d]`.
    """
    holders = 1 if config.roles else GROUPS
    held = holders * (own * ROWS * d * 2 + floats * ROWS * 4)
    stage = 2 * config.tile * d * 2 + ring_floats * config.tile * 4
    return held + config.lines * config.stages * stage


def fitted(config: Config, *sizes: int) -> Config:
    """`config` with the most stages that fit shared memory, `sizes` as for `shared_bytes`."""
    every = [dataclasses.replace(config, stages=n) for n in range(1, MOST_STAGES + 1)]
    return [c for c in every if shared_bytes(c, *sizes) <= SHARED_MEMORY - BARRIERS][-1]


def row_config(block_size: tuple[int, int], g: int) -> Config:
    """How warpgroups share the blocks of queries, for G heads of a unit."""
    if block_size[0] == 2 * ROWS:
        return Config(ROWS, 1, parts=2)
    return Config(ROWS, 1, heads=2) if g % 2 == 0 else Config(ROWS, 1, lines=2)


class Operands(NamedTuple):
    """Arrays of a problem beside those of tokens, flattened; what a form does not need is None.

    Attributes:
        order: int32 `[B' A' R]`: the blocks of each unit, longest list first.
        index: int32 `[B' A' R W]`, this and the next three as in `BlockLists`.
        count: int32 `[B' A' R]`.
        full: int32 `[B' A' R]`.
        kind: int32 `[B' A' R W]`.
        offset: int32 `[B]`.
        q_segments: int32 `[B T]`.
        k_segments: int32 `[B S]`.
        bias: float32 `[B A G R W]`.
        places: int32 `[128]`: 0, 1, ... Positions along the columns of a tile are read, since those
            that are computed stay in registers over the whole loop.
    """

    order: Any
    index: Any
    count: Any
    full: Any = None
    kind: Any = None
    offset: Any = None
    q_segments: Any = None
    k_segments: Any = None
    bias: Any = None
    places: Any = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes. The letters are those of `_attention_plan.py`; R and W are of the lists walked.

    Attributes:
        batches: Leading axes that may be 1: of the lists, k and v, offset, segments of queries and
            of keys, bias.
        by_key: Whether blocks of keys list blocks of queries, for dK and dV.
        interpreted: Whether the kernel is interpreted.
    """

    form: Form
    config: Config
    b: int
    a: int
    g: int
    t: int
    s: int
    d: int
    h_kv: int
    lists_heads: int
    r: int
    w: int
    batches: tuple[int, int, int, int, int, int]
    by_key: bool
    interpreted: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a block that has a list, and of one that is listed."""
        bq, bkv = self.form.block_size
        return (bkv, bq) if self.by_key else (bq, bkv)

    @property
    def each(self) -> int:
        """Steps of an entry; by key they take all heads of a unit."""
        return self.sizes[1] // self.config.tile * (self.g if self.by_key else 1)

    @property
    def inner(self) -> int:
        """CTAs of a list, or of two."""
        if self.by_key:
            return self.sizes[0] // ROWS if self.config.roles else 1
        return self.g // self.config.heads

    @property
    def items(self) -> int:
        """CTAs."""
        return self.b * self.a * -(-self.r // self.config.lines) * self.inner

    @property
    def masked(self) -> bool:
        """Whether a block may be partial at all."""
        form = self.form
        ragged = form.shape[1] % form.block_size[1] != 0
        return bool(form.rules) or form.causal or ragged or self.batches[3] > 0

    def of(self, b: jax.Array, which: int) -> jax.Array | int:
        """The batch entry of an array whose leading axis is B or 1."""
        return b if self.batches[which] > 1 else 0

    def kv_row(self, unit: jax.Array) -> jax.Array:
        """The first row of keys of a unit."""
        b, a = divide(unit, self.a)
        return (self.of(b, 1) * self.h_kv + lax.div(a * self.h_kv, jnp.int32(self.a))) * self.s


class Walk(NamedTuple):
    """What a warpgroup does in its CTA.

    Attributes:
        number: Of its list in the CTA.
        unit: Counted over the batch.
        block: That has the list.
        entry: The first entry of the list.
        full: Steps in full blocks.
        count: Steps.
        live: Whether there is anything to do; a pair of lists may have one only.
        head: Of the queries, counted over the batch; the first of a unit by key.
        first: Position of the first of the 64 tokens it holds.
    """

    number: Any
    unit: jax.Array
    block: jax.Array
    entry: jax.Array
    full: jax.Array
    count: jax.Array
    live: Any
    head: jax.Array
    first: jax.Array


class Step(NamedTuple):
    """What a step of a walk takes.

    Attributes:
        entry: Of the lists.
        bias: Place of its bias.
        first: Position of the first of its tokens.
        row: The first of its rows in the arrays of tokens.
    """

    entry: jax.Array
    bias: jax.Array
    first: jax.Array
    row: jax.Array


def walk(shape: Shape, operands: Operands, item: jax.Array, group: Any) -> Walk:
    """The walk of a warpgroup, or of a list if each warpgroup has its own."""
    config = shape.config
    number = group if config.lines > 1 else 0
    unit, item = divide(item, -(-shape.r // config.lines) * shape.inner)
    rank, inner = divide(item, shape.inner)
    rank = rank * config.lines + number
    b, a = divide(unit, shape.a)
    head = lax.div(a * shape.lists_heads, jnp.int32(shape.a))
    line = (shape.of(b, 0) * shape.lists_heads + head) * shape.r
    block = operands.order[line + jnp.minimum(rank, shape.r - 1)]
    line += block
    live = rank < shape.r
    count = jnp.where(live, operands.count[line] * shape.each, 0)
    full = count
    if operands.full is not None:
        full = jnp.where(live, operands.full[line] * shape.each, 0)
    head, first = unit * shape.g, block * shape.sizes[0]
    if shape.by_key:
        first += inner * ROWS
    else:
        head += inner * config.heads + (group if config.heads > 1 else 0)
    if config.parts > 1:
        first += group * ROWS
    return Walk(number, unit, block, line * shape.w, full, count, live, head, first)


def step_of(shape: Shape, operands: Operands, walk: Walk, i: jax.Array) -> Step:
    """Step i of a walk."""
    at, part = divide(i, shape.each)
    entry, head = walk.entry + at, walk.head
    if shape.by_key:
        more, part = divide(part, shape.sizes[1] // shape.config.tile)
        head += more
    first = operands.index[entry] * shape.sizes[1] + part * shape.config.tile
    row = head * shape.t if shape.by_key else shape.kv_row(walk.unit)
    return Step(entry, (head * shape.r + walk.block) * shape.w + at, first, row + first)


def alike(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K and v with as many batch entries; under vmap one may have one."""
    b = max(k.shape[0], v.shape[0])
    return jnp.broadcast_to(k, (b, *k.shape[1:])), jnp.broadcast_to(v, (b, *v.shape[1:]))


def problem(
    form: Form,
    config: Config,
    q: jax.Array,
    k: jax.Array,
    lists: BlockLists,
    extras: Extras,
    *,
    by_key: bool,
    interpret: Any,
) -> tuple[Shape, Operands]:
    """Sizes and operands of a kernel that walks `lists`."""
    bias = extras.key_bias if by_key else extras.bias
    lead = lambda x: 0 if x is None else x.shape[0]  # noqa: E731
    (b, a, g, t, d), (_, lists_heads, r, w) = q.shape, lists.index.shape
    arrays = (lists.index, k, extras.offset, extras.q_segments, extras.k_segments, bias)
    batches: Any = tuple(map(lead, arrays))
    sizes = b, a, g, t, k.shape[2], d, k.shape[1], lists_heads, r, w
    shape = Shape(form, config, *sizes, batches, by_key, interpret is not None)
    operands = Operands(
        order=jnp.argsort(-lists.count, axis=-1, stable=True).astype(jnp.int32),
        index=lists.index,
        count=lists.count,
        full=lists.full if shape.masked else None,
        kind=lists.kind if form.rules else None,
        offset=extras.offset if form.causal else None,
        q_segments=extras.q_segments,
        k_segments=extras.k_segments,
        bias=bias,
        places=jnp.arange(2 * ROWS, dtype=jnp.int32) if shape.masked else None,
    )
    return shape, jax.tree.map(lambda x: x.reshape(-1), operands)
