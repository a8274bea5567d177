"""Each pattern against its definition in numpy, and what its paper says about its reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import attention
from jaxsparse.attention import BlockMask, Chunks, Columns, QueriesFrom, Stride
from pallas_kernels._block_lists import FULL
from tests.conformance.lists import fast_jit

SHAPE, BLOCK = (48, 48), (4, 4)
RAGGED, UNEVEN = (13, 45), (4, 6)


def dense(mask):
    """[heads, T, S] of the only batch entry."""
    (result,) = np.asarray(mask.todense())
    return result


def blocks(mask):
    """[heads, R, C] of the only batch entry."""
    (result,) = np.asarray(mask.block_map)
    return result


def positions(shape, q_offset=0):
    q, k = np.mgrid[: shape[0], : shape[1]]
    return q + q_offset, k


def hops(seen, count):
    """Which keys a query depends on after `count` layers of the same pattern."""
    reach = np.eye(len(seen), dtype=bool)
    for _ in range(count):
        reach = reach @ seen
    return reach


@pytest.mark.parametrize("q_offset", [0, 7, 32])
@pytest.mark.parametrize(
    ("rule", "allows"),
    [
        (Stride(1), lambda q, k: q > -1),
        (Stride(5), lambda q, k: (q - k) % 5 == 0),
        (Stride(13), lambda q, k: (q - k) % 13 == 0),
        (Columns(8, 6), lambda q, k: k % 8 >= 6),
        (Columns(5, 4), lambda q, k: k % 5 >= 4),
        (Columns(12, 0), lambda q, k: q > -1),
        (Columns(17, 4), lambda q, k: k % 17 >= 4),
        (Chunks(6), lambda q, k: q // 6 == k // 6),
        (Chunks(5, start=3), lambda q, k: (k >= 3) & ((q - 3) // 5 == (k - 3) // 5)),
        (Chunks(9, 2, 3), lambda q, k: (2 <= k) & (k < 29) & ((q - 2) // 9 == (k - 2) // 9)),
        (QueriesFrom(11), lambda q, k: q >= 11),
    ],
    ids=lambda value: "" if callable(value) and not hasattr(value, "blocks") else str(value),
)
def test_rules_and_their_blocks_are_exact(rule, allows, q_offset):
    mask = BlockMask.from_rule(rule, RAGGED, UNEVEN, q_offset=q_offset)
    want = np.broadcast_to(allows(*positions(RAGGED, q_offset)), RAGGED)
    np.testing.assert_array_equal(dense(mask)[0], want)
    for r, c in np.ndindex(mask.grid):
        part = want[4 * r : 4 * r + 4, 6 * c : 6 * c + 6]
        kind = int(mask.kinds[0, 0, r, c])
        assert (kind >= 0) == part.any() and (kind == FULL) == part.all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stride(0), "step must be at least 1"),
        (lambda: Columns(4, first=4), "0 <= first < period"),
        (lambda: Chunks(0), "size must be at least 1"),
        (lambda: attention.sliding_window(SHAPE, BLOCK, left=-1), "must not be negative"),
        (lambda: attention.sinks(SHAPE, BLOCK, count=0), "count must be at least 1"),
        (lambda: attention.strided(SHAPE, BLOCK, stride=0), "stride must be at least 1"),
        (lambda: attention.fixed(SHAPE, BLOCK, stride=4, summary=5), "1 <= summary <= stride"),
        (lambda: attention.moa(SHAPE, BLOCK, spans=[]), "at least one head"),
        (lambda: attention.s2(SHAPE, BLOCK, heads=0, stride=2, local=1), "heads must be at least"),
        (lambda: attention.power_attention(SHAPE, BLOCK, local=0), "local must be at least 1"),
        (lambda: attention.pixelfly(SHAPE, BLOCK, edges=-1), "edges must be at least 0"),
        (
            lambda: attention.bigbird(SHAPE, BLOCK, key=jax.random.key(0), window=2),
            "window must be odd",
        ),
        (
            lambda: attention.random_blocks(
                SHAPE,
                BLOCK,
                count=1,
                key=jax.random.key(0),
                exclude=attention.causal(SHAPE, (8, 4)),
            ),
            "exclude must be a mask of",
        ),
        (lambda: attention.block_pattern(np.equal, (0, 4), BLOCK), "must be positive"),
        (lambda: attention.documents(jnp.zeros((1, 2, 3), int), BLOCK), r"must be \[B, T\]"),
        (lambda: attention.anchor_window(jnp.zeros(4, int), BLOCK, window=-1), "not be negative"),
        (
            lambda: attention.block_rank(SHAPE, BLOCK, instruction=4, document=11, count=4),
            "must fit in T = S",
        ),
        (lambda: attention.uniba(SHAPE, BLOCK, grid=(3, 5)), "needs T = S of 15 blocks"),
        (
            lambda: attention.neighbourhood(SHAPE, BLOCK, grid=(3, 4), before=(1,)),
            "for each of the 2 axes",
        ),
        (lambda: attention.blocked_order((4, 6), (2, 4)), "tile must divide grid"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("q_offset", [0, 32])
def test_windows_and_sinks(q_offset):
    q, k = positions(RAGGED, q_offset)
    options = {"q_offset": q_offset}
    window = attention.sliding_window(RAGGED, UNEVEN, left=5, right=2, **options)
    np.testing.assert_array_equal(dense(window)[0], (k >= q - 5) & (k <= q + 2))
    first = attention.sinks(RAGGED, UNEVEN, count=3, **options)
    np.testing.assert_array_equal(dense(first)[0], (k < 3) & (k <= q))
    for_all = attention.sinks(RAGGED, UNEVEN, count=3, causal=False, **options)
    np.testing.assert_array_equal(dense(for_all)[0], k < 3)
    past = attention.causal(RAGGED, UNEVEN, **options)
    np.testing.assert_array_equal(dense(past & ~window)[0], k < q - 5)


def test_a_window_reaches_as_far_as_its_layers():
    seen = dense(attention.sliding_window(SHAPE, BLOCK, left=5))[0]
    q, k = positions(SHAPE)
    for layers in (1, 2, 4):
        np.testing.assert_array_equal(hops(seen, layers), (k <= q) & (k >= q - 5 * layers))


@pytest.mark.parametrize("stride", [3, 7, 16])
def test_strided_covers_all_in_two_hops(stride):
    mask = attention.strided(SHAPE, BLOCK, stride=stride)
    q, k = positions(SHAPE)
    near, far = dense(mask)
    np.testing.assert_array_equal(near, (k <= q) & (k >= q - stride))
    np.testing.assert_array_equal(far, (k <= q) & ((q - k) % stride == 0))
    np.testing.assert_array_equal(far @ near, k <= q)
    merged = dense(attention.strided(SHAPE, BLOCK, stride=stride, merged=True))
    np.testing.assert_array_equal(merged[0], near | far)


@pytest.mark.parametrize(("stride", "summary"), [(4, 1), (8, 3), (16, 16)])
def test_fixed_covers_all_in_two_hops(stride, summary):
    mask = attention.fixed(SHAPE, BLOCK, stride=stride, summary=summary)
    q, k = positions(SHAPE)
    own, ends = dense(mask)
    np.testing.assert_array_equal(own, (k <= q) & (k // stride == q // stride))
    np.testing.assert_array_equal(ends, (k <= q) & (k % stride >= stride - summary))
    earlier = k // stride < q // stride
    assert (ends @ own)[earlier].all()  # by the summaries of earlier chunks
    merged = dense(attention.fixed(SHAPE, BLOCK, stride=stride, summary=summary, merged=True))[0]
    np.testing.assert_array_equal(merged, own | ends)
    np.testing.assert_array_equal(hops(merged, 2), k <= q)


def test_moa_spans():
    spans = [(4, 0.0), (0, 0.25), (2, 0.5), (0, 0.0), (4, 0.0)]
    q, k = positions(SHAPE)
    for length, sizes in ((None, (4, 12, 26, 1, 4)), (100, (4, 25, 52, 1, 4))):
        mask = attention.moa(SHAPE, BLOCK, spans=spans, sinks=3, length=length)
        assert mask.heads == 5 and len(mask.rules) <= 5
        for seen, size in zip(dense(mask), sizes, strict=True):
            np.testing.assert_array_equal(seen, (k <= q) & ((q - k < size) | (k < 3)))
    bare = dense(attention.moa(SHAPE, BLOCK, spans=[(4, 0)], sinks=0))[0]
    np.testing.assert_array_equal(bare, (k <= q) & (q - k < 4))


def test_block_pattern_sees_what_any_token_sees():
    for block_size, q_offset in (((4, 6), 0), ((4, 6), 5), ((12, 4), 0), ((5, 4), 32), ((4, 4), 8)):
        mask = attention.block_pattern(
            lambda i, j: (i + 2 * j) % 3 == 0, RAGGED, block_size, causal=True, q_offset=q_offset
        )
        q, k = positions(RAGGED, q_offset)
        i, j = q // block_size[1], k // block_size[1]
        by_token = (i + 2 * j) % 3 == 0
        for r in range(mask.grid[0]):
            line = slice(r * block_size[0], (r + 1) * block_size[0])
            want = by_token[line].any(0) & (k <= q)[line]
            np.testing.assert_array_equal(dense(mask)[0, line], want)


@pytest.mark.parametrize(("heads", "stride"), [(2, 2), (4, 4), (6, 4), (2, 4), (4, 8)])
def test_s2_shards_are_the_whole_context(heads, stride):
    local = 2
    mask = attention.s2(SHAPE, BLOCK, heads=heads, stride=stride, local=local)
    q, k = positions(SHAPE)
    i, j = q // 4, k // 4
    for h, seen in enumerate(dense(mask)):
        shard = (j + 1 + h * max(1, stride // heads)) % stride == 0
        np.testing.assert_array_equal(seen, (k <= q) & ((i - j < local) | shard))
    together = dense(mask).any(0)
    if heads >= stride:
        np.testing.assert_array_equal(together, k <= q)
    else:  # as many shards as heads
        far = (i - j >= local)[-1]
        assert together[-1][far].mean() == pytest.approx(heads / stride, abs=0.1)
    apart = blocks(mask)[:stride] & (np.arange(12)[:, None] - np.arange(12) >= local)
    assert (apart.sum(0) <= 1).all()  # shards of the first heads do not overlap


@pytest.mark.parametrize("sinks", [0, 2])
def test_power_attention_reaches_two_to_the_layers(sinks):
    mask = attention.power_attention((256, 256), (4, 4), sinks=sinks)
    seen = blocks(mask)[0]
    i, j = np.mgrid[:64, :64]
    distance = i - j
    powers = np.isin(distance, [0, 1, 2, 4, 8, 16, 32])
    np.testing.assert_array_equal(seen, (powers | (j < sinks)) & (j <= i))
    assert not dense(mask)[0][positions((256, 256))[0] < positions((256, 256))[1]].any()
    for layers in range(1, 7):
        reach = hops(seen, layers)
        assert reach[(distance >= 0) & (distance < 2**layers)].all()
    assert hops(seen, 6)[distance >= 0].all()
    assert seen.sum(1).max() <= 7 + sinks  # log2 of the blocks, and its own


def test_power_attention_window():
    i, j = np.mgrid[:12, :12]
    seen = blocks(attention.power_attention(SHAPE, BLOCK, local=4, sinks=0))[0]
    assert seen[(i >= j) & (i - j < 4)].all() and not seen[i - j == 5].any()


@pytest.mark.parametrize("size", [8, 16])
def test_pixelfly_is_a_butterfly(size):
    mask = attention.pixelfly((size * 4, size * 4), BLOCK, edges=0)
    seen, (i, j) = blocks(mask)[0], np.mgrid[:size, :size]
    ones = np.vectorize(lambda x: int(x).bit_count())(i ^ j)
    np.testing.assert_array_equal(seen, ones <= 1)
    levels = size.bit_length() - 1
    assert (seen.sum(1) == levels + 1).all()
    for layers in range(levels + 1):  # each layer flips one bit: the product of the factors is full
        np.testing.assert_array_equal(hops(seen, layers), ones <= layers)
    narrow = blocks(attention.pixelfly((size * 4,) * 2, BLOCK, edges=0, stride=2))[0]
    np.testing.assert_array_equal(narrow, (ones <= 1) & ((i ^ j) <= 2))
    cross = blocks(attention.pixelfly((size * 4,) * 2, BLOCK, edges=2))[0]
    np.testing.assert_array_equal(cross, seen | (i < 2) | (j < 2))
    odd = blocks(attention.pixelfly((size * 4 - 9,) * 2, BLOCK, edges=0))[0]
    np.testing.assert_array_equal(odd, seen[: size - 2, : size - 2])


def test_random_blocks(key):
    mask = attention.random_blocks(SHAPE, BLOCK, count=3, key=key, heads=4)
    seen = blocks(mask)
    assert (seen.sum(-1) == 3).all() and len({head.tobytes() for head in seen}) == 4
    again = attention.random_blocks(SHAPE, BLOCK, count=3, key=key, heads=4)
    np.testing.assert_array_equal(seen, blocks(again))
    other = attention.random_blocks(SHAPE, BLOCK, count=3, key=jax.random.key(1), heads=4)
    assert (seen != blocks(other)).any()
    past = ~attention.causal(SHAPE, BLOCK)
    before = blocks(attention.random_blocks(SHAPE, BLOCK, count=3, key=key, heads=2, exclude=past))
    i, j = np.mgrid[:12, :12]
    assert not before[:, j >= i].any()
    np.testing.assert_array_equal(
        before.sum(-1), np.broadcast_to(np.minimum(3, range(12)), (2, 12))
    )


def test_bigbird(key):
    mask = attention.bigbird(SHAPE, BLOCK, key=key, heads=2, random=2)
    i, j = np.mgrid[:12, :12]
    base = (abs(i - j) <= 1) | np.isin(i, (0, 11)) | np.isin(j, (0, 11))
    seen = blocks(mask)
    assert (seen & base == base).all()
    inner = (seen & ~base)[:, 1:-1].sum(-1)
    assert (inner == 2).all() and len({head.tobytes() for head in seen}) == 2
    assert hops(base, 2).all()  # by way of the global blocks
    for size in (32, 64):  # linear: the rows that are not global have as many blocks at any length
        long = blocks(attention.bigbird((size * 4, size * 4), BLOCK, key=key, heads=1))[0]
        assert (long[2:-2].sum(1) == 3 + 3 + 2).all()


def test_documents_see_no_other(key):
    lengths = jnp.array([[7, 0, 20, 9], [12, 12, 12, 12]])
    ids = attention.segment_ids(lengths, 48)
    want = np.stack([np.repeat(np.arange(5), [7, 0, 20, 9, 12]), np.repeat(np.arange(4), 12)])
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_array_equal(attention.segment_ids(lengths[0], 48), want[0])
    mask = jax.jit(lambda ids: attention.documents(ids, BLOCK))(ids)
    same = want[:, :, None] == want[:, None]
    per_block = same.reshape(2, 12, 4, 12, 4).any((2, 4))
    np.testing.assert_array_equal(mask.block_map[:, 0], per_block)
    np.testing.assert_array_equal(mask.todense()[1, 0], same[1])  # documents end with blocks
    q = jax.random.normal(key, (2, 48, 1, 8))
    run = fast_jit(attention.block_sparse_attention, static_argnames="causal")

    def out(v):
        return run(q, q, v, mask, segment_ids=ids, causal=False)

    v = jax.random.normal(key, q.shape)
    for document in range(5):
        mine = jnp.asarray(want == document)[..., None, None]
        changed = out(jnp.where(mine, v, 1e3))  # whatever the others hold
        np.testing.assert_allclose(jnp.where(mine, changed - out(v), 0), 0, atol=1e-5)


def test_documents_of_any_order():
    ids = jnp.array([3, 1, 1, 1, 0, 2, 2, 5, 5, 9])
    kv_ids = jnp.array([1, 1, 9, 9, 2, 7, 7])
    mask = attention.documents(ids, (2, 3), kv_segment_ids=kv_ids)
    assert mask.shape == (10, 7) and mask.grid == (5, 3)
    shared = np.asarray(ids)[:, None] == np.asarray(kv_ids)
    assert not (shared & ~dense(mask)[0]).any()


def test_anchor_window():
    lengths = [4, 8, 4, 8, 12, 12]
    groups = np.repeat(np.arange(6), lengths)
    ids = attention.segment_ids(jnp.array(lengths), 48)
    g, h = groups[:, None], groups
    for window, anchors in ((0, 1), (1, 1), (2, 0), (1, 2)):
        mask = attention.anchor_window(ids, BLOCK, window=window, anchors=anchors)
        want = (h <= g) & ((g - h <= window) | (h < anchors))
        np.testing.assert_array_equal(dense(mask)[0], want)
    ragged = np.repeat(np.arange(4), [5, 9, 14, 20])
    mask = attention.anchor_window(jnp.asarray(ragged), BLOCK)
    g, h = ragged[:, None], ragged
    assert dense(mask)[0][(h <= g) & ((g - h <= 1) | (h < 1))].all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("instruction", "document", "count"), [(4, 8, 4), (3, 5, 7), (0, 11, 3)])
def test_block_rank(instruction, document, count, causal):
    options = {"instruction": instruction, "document": document, "count": count}
    mask = attention.block_rank(SHAPE, BLOCK, **options, causal=causal)
    q, k = positions(SHAPE)
    end = instruction + document * count

    def part(x):
        return np.where(x < instruction, -1, np.where(x < end, (x - instruction) // document, 99))

    want = (part(k) == part(q)) | (part(k) == -1) | (part(q) == 99)
    np.testing.assert_array_equal(dense(mask)[0], want & (k <= q) if causal else want)
    documents = attention.block_rank((400, 400), BLOCK, instruction=8, document=32, count=12)
    listed = blocks(documents)[0][2:-2].sum(1)
    assert listed.max() <= 2 + 8  # the instruction and one document: linear in their number


def test_blocked_order():
    for grid, tile in (((4, 6), (2, 3)), ((4, 4, 6), (2, 4, 2))):
        order = np.asarray(attention.blocked_order(grid, tile))
        assert sorted(order) == list(range(np.prod(grid)))
        coordinates = np.stack(np.unravel_index(order, grid), -1).reshape(
            -1, np.prod(tile), len(grid)
        )
        tiles = coordinates // np.array(tile)
        assert (tiles == tiles[:, :1]).all()
        numbers = np.ravel_multi_index(tuple(tiles[:, 0].T), np.array(grid) // np.array(tile))
        np.testing.assert_array_equal(numbers, np.arange(len(tiles)))


@pytest.mark.parametrize(
    ("grid", "before", "after"),
    [
        ((3, 4), (1, 1), None),
        ((3, 4), (1, 0), (0, 2)),
        ((2, 3, 2), (1, 1, 0), (0, 1, 1)),
        ((12,), (2,), (0,)),
    ],
)
def test_neighbourhood(grid, before, after):
    mask = attention.neighbourhood(SHAPE, BLOCK, grid=grid, before=before, after=after)
    at = np.stack(np.unravel_index(np.arange(12), grid), -1)
    step = at[None] - at[:, None]
    near = (step >= -np.array(before)) & (step <= np.array(before if after is None else after))
    np.testing.assert_array_equal(blocks(mask)[0], near.all(-1))
    assert not mask.rules


def test_uniba_is_itself_left_top_and_top_left():
    seen = blocks(attention.uniba(SHAPE, BLOCK, grid=(3, 4)))[0]
    for row, column in np.ndindex(3, 4):
        want = {(row - a, column - b) for a in (0, 1) for b in (0, 1)}
        want = {4 * r + c for r, c in want if r >= 0 and c >= 0}
        assert set(np.flatnonzero(seen[4 * row + column])) == want
    at = np.stack(np.unravel_index(np.arange(12), (3, 4)), -1)
    step = at[:, None] - at[None]
    for layers in (1, 2):
        np.testing.assert_array_equal(hops(seen, layers), ((step >= 0) & (step <= layers)).all(-1))


def test_patterns_trace(key):
    """One compilation, whatever the ids and the key."""

    @jax.jit
    def build(ids, key):
        mask = attention.documents(ids, BLOCK) & attention.causal(SHAPE, BLOCK)
        return mask | attention.random_blocks(SHAPE, BLOCK, count=1, key=key, heads=2)

    ids = attention.segment_ids(jnp.array([20, 28]), 48)
    traced, eager = build(ids, key), build.__wrapped__(ids, key)
    np.testing.assert_array_equal(traced.todense(), eager.todense())
    build(ids + 1, jax.random.key(3))
    assert build._cache_size() == 1
