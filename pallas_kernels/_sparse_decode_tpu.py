"""Decode attention over listed pages on TPU: pages come by hand-made DMA into one wide tile.

Grid (cores, lists): a step takes one list, the pages of one sequence and key head, and loops over
its chunks of `pages` pages. The pages of a chunk are copied side by side into one tile
of VMEM, from anywhere in the cache, while the two chunks before are waited for and worked on;
behind the last chunk of a list comes the first of the next one, so that HBM never waits. All heads
of the group and all tokens are the rows of one product with the keys, and of one with the values;
the softmax is online, in base 2. Lists come to scalar memory row by row, and may be of any number.

Only the listed pages are copied. A chunk that is not full, or has keys after the position of a
token, is masked, and what may hold anything is zeroed before it meets a weight of zero; other
chunks skip both. Of a cache of one plane a row is a key and its value: a query then is padded with
zeros to its width W = 2 D, and the values are the second half of the sums.

FLOPs 4 R W a key for R = T H / H_kv rows. Bytes 4 D a key in bfloat16: bound by HBM while these
take longer than the schedule of a chunk, see `experiments/tpu_decode.py`. VMEM: see `vmem_bytes`.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._block_sparse_tpu import compiler_params, each
from pallas_kernels._compat import Tpu, tpu
from pallas_kernels._op import in_turn, result_like

if TYPE_CHECKING:
    from pallas_kernels._sparse_decode import Lists

LANES = 128
TILES = 3  # one is worked on, two are on their way
MASKED = -1e30  # not -inf: inf - inf is NaN in a row of which nothing is seen yet
MOST_ROWS = 256
MOST_ENTRIES = 2**15  # of a list: a row of 2 integers an entry, and one more, twice each in SMEM


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut; see the head of the file.

    Attributes:
        pages: Of a chunk.
        cores: TensorCores that share a call.
    """

    pages: int
    cores: int = 1


def supports(dtype: Any, page: int, width: int, rows: int, entries: int) -> str:
    """Why the kernel cannot take such operands, or "" if it can.

    Args:
        dtype: Of q and the cache.
        page: Tokens of a page.
        width: Of a plane of the cache: D, or 2 D if there is one plane.
        rows: Queries of a key head, T * H / H_kv.
        entries: Length of a list.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16; got {jnp.dtype(dtype)}"
    if width % LANES:
        return (
            f"the TPU kernel needs rows of a multiple of {LANES} in the cache; got {width}. With "
            "D = 64 join key and value: kv_pages [pages, H_kv, 1, page, 2 * D]"
        )
    least = 32 // jnp.dtype(dtype).itemsize
    if page % least or (page % LANES and LANES % page):
        return (
            f"the TPU kernel needs pages of {least} or more tokens of {jnp.dtype(dtype)}, and a "
            f"power of 2 or a multiple of {LANES}; got {page}"
        )
    if rows > MOST_ROWS:
        return f"the TPU kernel takes up to {MOST_ROWS} queries a key head; got {rows}"
    if entries > MOST_ENTRIES:
        return f"the TPU kernel takes lists of up to {MOST_ENTRIES} pages; got {entries}"
    return ""


def vmem_bytes(config: Config, rows: int, planes: int, page: int, width: int, item: int) -> int:
    """VMEM of the kernel: tiles; scores and weights; 2 queries, 2 outputs, 2 lse and the sum."""
    keys = config.pages * page
    blocks = 4 * rows * width * item + 2 * rows * LANES * 4 + rows * width * 4
    return TILES * keys * planes * width * item + rows * keys * (4 + item) + blocks


def choose_config(
    rows: int, planes: int, page: int, width: int, entries: int, dtype: Any, device: Tpu
) -> Config:
    """Chunks of 512 KiB, of 1 MiB where the MXU is 256 wide, in even shares of a full list.

    That takes HBM long enough to hide what a turn costs by itself; chunks are smaller where there
    are so many rows that their scores would fill VMEM.
    """
    item = jnp.dtype(dtype).itemsize
    sizes = rows, planes, page, width, item
    least = max(1, LANES // page)  # scores fill their lanes
    most = max(least, device.mxu * 2**12 // (planes * page * width * item) // least * least)
    while most > least and vmem_bytes(Config(most), *sizes) > device.vmem // 2:
        most = max(least, most // 2 // least * least)
    pages = -(-entries // -(-entries // most))
    return Config(-(-pages // least) * least, device.cores)


def _kernel(
    positions,  # SMEM [1, 1, T]
    starts,  # SMEM [1, 1, P + chunks], of pages, and whether a token does not see all of a chunk
    lists,  # SMEM [1, TILES, 1 + P], count and pages of this list and of those behind it
    q_ref,  # VMEM [R, W]
    kv_hbm,  # HBM [pages * H_kv, planes, page, W]
    *refs,  # see below
    group: int,
    scale: float,
    softcap: float | None,
    with_lse: bool,
):
    (
        out_ref,  # VMEM [R, W]
        *lse_ref,  # VMEM [R, 128] float32
        tiles,  # VMEM [TILES, C, planes, page, W]
        turn,  # SMEM [1], the tile that the first chunk of this list comes to
        arrived,  # DMA semaphores [TILES]
    ) = refs
    rows, (_, _, page, width) = q_ref.shape[0], kv_hbm.shape
    c, tokens, entries = tiles.shape[1], positions.shape[-1], lists.shape[-1] - 1
    keys, count = c * page, lists[0, 0, 0]
    line, lines = pl.program_id(1), pl.num_programs(1)
    newest = positions[0, 0, 0]
    for t in range(1, tokens):
        newest = jnp.maximum(newest, positions[0, 0, t])

    chunks, *later = (lax.div(lists[0, i, 0] + (c - 1), c) for i in range(TILES - 1))
    many = [jnp.maximum(1, n) for n in (chunks, *later)]

    def fetch(chunk, to, usual=False):
        """Start copies of a chunk, which may be one of a list behind: each has one at least."""
        which = jnp.int32(0)
        for behind in range(TILES - 1):
            past = (which == behind) & (chunk >= many[behind])
            which = jnp.where(past, behind + 1, which)
            chunk = jnp.where(past, chunk - many[behind], chunk)
        left = jnp.where(line + which < lines, lists[0, which, 0] - chunk * c, 0)
        entry = 1 + chunk * c

        def start(member):
            source = kv_hbm.at[lists[0, which, entry + member]]
            pltpu.make_async_copy(source, tiles.at[to, member], arrived.at[to]).start()

        if usual:
            each(jnp.minimum(left, c), c, start)
        else:
            lax.fori_loop(0, jnp.minimum(left, c), lambda member, _: start(member), None)

    def wait(left, at):
        @pl.when(left >= c)
        def _():
            whole = tiles.at[at]
            pltpu.make_async_copy(whole, whole, arrived.at[at]).wait()

        @pl.when(left < c)
        def _():
            one = tiles.at[at, 0]
            one = pltpu.make_async_copy(one, one, arrived.at[at])
            lax.fori_loop(0, left, lambda member, _: one.wait(), None)

    def start_of(chunk, member):
        return starts[0, 0, chunk * c + member]

    def clear(chunk, at):
        """Zero the rows of keys that no token sees."""

        def one(member, _):
            left = newest + 1 - start_of(chunk, member)

            @pl.when(left < page)
            def _():
                kept = tiles[at, member]
                line = lax.broadcasted_iota(jnp.int32, kept.shape, 1)
                tiles[at, member] = jnp.where(line < left, kept, jnp.zeros_like(kept))

        lax.fori_loop(0, c, one, None)

    def masked(scores, chunk):
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        parts = []
        for first in range(0, keys, LANES):
            at = start_of(chunk, first // page) + first % page + lane
            for member in range(1, LANES // page):
                begin = start_of(chunk, first // page + member) + lane - member * page
                at = jnp.where(lane >= member * page, begin, at)
            parts.append(at)
        token = lax.div(lax.broadcasted_iota(jnp.int32, (rows, 1), 0), group)
        seen = jnp.full((rows, 1), positions[0, 0, 0], jnp.int32)
        for t in range(1, tokens):
            seen = jnp.where(token >= t, positions[0, 0, t], seen)
        return jnp.where(jnp.concatenate(parts, 1) <= seen, scores, MASKED)

    @pl.when(line == 0)
    def _():
        turn[0] = 0
        for chunk in range(TILES - 1):
            fetch(jnp.int32(chunk), chunk)

    first = turn[0]

    def work(chunk, carry):
        top, mass, total = carry
        at, left = lax.rem(first + chunk, TILES), count - chunk * c
        ragged = starts[0, 0, entries + chunk] != 0
        wait(left, at)
        pl.when(ragged)(lambda: clear(chunk, at))
        fetch(chunk + TILES - 1, lax.rem(at + TILES - 1, TILES), usual=True)
        scores = lax.dot_general(
            q_ref[...],
            tiles[at, :, 0].reshape(keys, width),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if softcap is None:
            scores = scores * (scale * math.log2(math.e))
        else:
            scores = jnp.tanh(scores * (scale / softcap)) * (softcap * math.log2(math.e))
        scores = lax.cond(ragged, lambda s: masked(s, chunk), lambda s: s, scores)
        new_top = jnp.maximum(top, jnp.max(scores, 1, keepdims=True))
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top)
        mass = shrink * mass + jnp.sum(weights, 1, keepdims=True)
        values = tiles[at, :, tiles.shape[2] - 1].reshape(keys, width)
        more = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_top, mass, shrink * total + more

    start = (
        jnp.full((rows, 1), MASKED, jnp.float32),
        jnp.zeros((rows, 1), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    top, mass, total = lax.fori_loop(0, chunks, work, start)
    pl.when(chunks == 0)(lambda: fetch(jnp.int32(TILES - 1), lax.rem(first + TILES - 1, TILES)))
    turn[0] = lax.rem(first + jnp.maximum(chunks, 1), TILES)
    # A row that saw no key has equal weights, those of what was masked.
    seen = top > MASKED / 2
    mass = jnp.where(seen, mass, 1.0)
    out_ref[...] = jnp.where(seen, total / mass, 0.0).astype(out_ref.dtype)
    if with_lse:
        lse = jnp.where(seen, (top + jnp.log2(mass)) * math.log(2.0), -jnp.inf)
        lse_ref[0][...] = jnp.broadcast_to(lse, (rows, LANES))


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    lists: Lists,
    positions: jax.Array,
    *,
    scale: float,
    logit_softcap: float | None,
    return_lse: bool,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Out [L, R, D] and lse [L, R] of rows [L, R, D]; see `IMPLEMENTATIONS`."""
    page, width = kv_pages.shape[3:]
    reason = supports(q.dtype, page, width, q.shape[1], lists.page.shape[1])
    if reason:
        raise NotImplementedError(f"sparse_decode_attention: {reason}. Take implementation='xla'.")

    @jax.custom_batching.custom_vmap
    def run(q: jax.Array, kv_pages: jax.Array, lists: Lists, positions: jax.Array):
        options = {"scale": scale, "softcap": logit_softcap, "with_lse": return_lse}
        return _launch(q, kv_pages, lists, positions, options, config, interpret)

    @run.def_vmap
    def _(size: int, batched: Any, q: Any, kv_pages: Any, lists: Any, positions: Any):
        out_batched = [True] * (1 + return_lse)
        if batched[1]:
            return in_turn(run, batched, q, kv_pages, lists, positions), out_batched

        def flat(a: jax.Array, has: bool) -> jax.Array:
            a = a if has else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        has = batched[0], batched[2], batched[3]
        q, lists, positions = jax.tree.map(flat, (q, lists, positions), has)
        found = run(q, kv_pages, lists, positions)
        return [a.reshape(size, -1, *a.shape[1:]) for a in found], out_batched

    out, *lse = run(q, kv_pages, lists, positions)
    return out, lse[0] if lse else None


def _launch(
    q: jax.Array,
    kv_pages: jax.Array,
    lists: Lists,
    positions: jax.Array,
    options: dict[str, Any],
    config: Config | None,
    interpret: Any,
) -> list[jax.Array]:
    """Out, and lse if asked for. What is made here is little, for it takes time of its own."""
    device, with_lse = tpu(), options["with_lse"]
    (n, r, d), (_, heads, planes, page, width), dtype = q.shape, kv_pages.shape, q.dtype
    (b, tokens), entries = positions.shape, lists.page.shape[1]
    config = config or choose_config(r, planes, page, width, entries, dtype, device)
    c, chunks = config.pages, -(-entries // config.pages)
    lists = lists._replace(
        page=jnp.pad(lists.page, ((0, 0), (0, chunks * c - entries))),
        start=jnp.pad(lists.start, ((0, 0), (0, chunks * c - entries)), constant_values=2**30),
    )
    entries = chunks * c
    cores, more = config.cores, -n % config.cores  # lists without pages
    per = (n + more) // cores
    padded = jnp.pad(q, ((0, more), (0, 0), (0, width - d)))
    # Pages of one head follow each other in [pages * H_kv, planes, page, W].
    head = jnp.arange(n, dtype=jnp.int32) % heads
    rows = jnp.concatenate([lists.count[:, None], lists.page * heads + head[:, None]], 1)
    rows = jnp.pad(rows, ((0, more + TILES - 1), (0, 0)))
    rows = jnp.stack([rows[i : i + n + more] for i in range(TILES)], 1)

    oldest = jnp.repeat(positions.min(1), heads)[:, None]
    unseen = lists.start.reshape(n, chunks, c).max(2) + page - 1 > oldest
    starts = jnp.concatenate([lists.start, unseen.astype(jnp.int32)], 1)

    def line(core: Any, step: Any) -> Any:
        return core * per + step

    def scalars(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: (index(*at), 0, 0), memory_space=pltpu.SMEM)

    def block(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, r, size), lambda *at: (line(*at), 0, 0))

    like = result_like(padded, padded.shape)
    lse_like = like.update(shape=(n + more, r, LANES), dtype=jnp.float32)
    keys = n * entries * page
    found = pl.pallas_call(
        partial(_kernel, group=r // tokens, **options),
        grid=(cores, per),
        in_specs=[
            scalars((1, 1, tokens), lambda *at: jnp.minimum(lax.div(line(*at), heads), b - 1)),
            scalars((1, 1, entries + chunks), lambda *at: jnp.minimum(line(*at), n - 1)),
            scalars((1, TILES, 1 + entries), line),
            block(width),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[block(width), block(LANES)][: 1 + with_lse],
        out_shape=[like, lse_like][: 1 + with_lse],
        scratch_shapes=[
            pltpu.VMEM((TILES, config.pages, *kv_pages.shape[2:]), dtype),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((TILES,)),
        ],
        compiler_params=compiler_params(device, 2),
        cost_estimate=pl.CostEstimate(
            flops=4 * r * keys * width,
            bytes_accessed=keys * planes * width * dtype.itemsize + 2 * padded.nbytes,
            transcendentals=r * keys,
        ),
        interpret=interpret,
        name="sparse_decode_attention",
    )(
        positions[:, None],
        starts[:, None],
        rows,
        padded,
        kv_pages.reshape(-1, planes, page, width),
    )
    out, *lse = found
    return [out[:n, :, width - d :], *(a[:n, :, 0] for a in lse)]
