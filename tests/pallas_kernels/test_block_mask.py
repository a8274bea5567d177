"""BlockMask is boolean algebra on tokens, whatever its lists look like; the oracle is numpy."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental import checkify

from pallas_kernels import BlockMask, Prefix, Where, Window
from pallas_kernels._block_lists import FULL, NONE
from tests.conformance.lists import fast_jit


def _even(q, k):
    return (q + k) % 2 == 0


RULES = {
    Window(None, 0): lambda q, k: k <= q,
    Window(3, 1): lambda q, k: (k >= q - 3) & (k <= q + 1),
    Window(0, None): lambda q, k: k >= q,
    Prefix(4): lambda q, k: (k < 4) & (q >= 0),
    Where(_even): _even,
}
CAUSAL, BAND, LATER, PREFIX, EVEN = RULES
GRIDS = (((13, 10), (4, 3)), ((8, 12), (4, 4)))  # (T, S), blocks; the first one ragged


def tokens(rule, shape):
    """What a rule allows, in numpy."""
    q, k = np.mgrid[: shape[0], : shape[1]]
    return RULES[rule](q, k)


def dense_of(kinds, rules, shape, block_size):
    """What a map of kinds allows, token by token, in numpy."""
    kinds = np.asarray(kinds).repeat(block_size[0], 2).repeat(block_size[1], 3)
    kinds = kinds[:, :, : shape[0], : shape[1]]
    dense = kinds == 0
    for kind, rule in enumerate(rules, 1):
        dense |= (kinds == kind) & tokens(rule, shape)
    return dense


PAIRS = (  # grid, and the heads, batch and rules of two masks
    (GRIDS[0], (1, 1, (CAUSAL,)), (1, 1, (EVEN, CAUSAL))),
    (GRIDS[0], (1, 2, (BAND, PREFIX)), (4, 1, (CAUSAL,))),
    (GRIDS[1], (4, 1, (EVEN,)), (2, 2, (BAND, LATER))),
    (GRIDS[1], (2, 1, ()), (2, 1, (PREFIX, EVEN))),
)


def check_lists(mask):
    """Full blocks first, each part ascending; `by_key` is the transpose; kinds have a rule."""
    entries = []
    for lists, other in zip((mask.by_query, mask.by_key), mask.grid[::-1], strict=True):
        index, kind, full, count = map(np.asarray, lists)
        assert index.dtype == kind.dtype == full.dtype == count.dtype == np.int32
        assert (
            ((index >= 0) & (index < other)).all() and (0 <= full).all() and (full <= count).all()
        )
        found = set()
        for place in np.ndindex(count.shape):
            line, f, n = index[place], full[place], count[place]
            assert (np.diff(line[:f]) > 0).all() and (np.diff(line[f:n]) > 0).all()
            assert (kind[place][:f] == FULL).all()
            assert ((kind[place][f:n] > FULL) & (kind[place][f:n] <= len(mask.rules))).all()
            found |= {(*place, *pair) for pair in zip(line[:n], kind[place][:n], strict=True)}
        entries.append(found)
    assert {(b, a, c, r, kind) for b, a, r, c, kind in entries[0]} == entries[1]


@pytest.mark.parametrize("pair", PAIRS)
def test_algebra(pair):
    (shape, block_size), *sides = pair
    grid = -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])

    @fast_jit
    def joined(*kinds):
        one, two = (
            BlockMask.from_kinds(k, shape, block_size, rules=rules)
            for k, (_, _, rules) in zip(kinds, sides, strict=True)
        )
        results = one, two, one & two, one | two, ~(one | two), one & ~two
        return [(mask, mask.todense()) for mask in results]

    @hypothesis.given(st.integers(0, 2**31))
    def check(seed):
        draw = np.random.default_rng(seed)
        kinds = [draw.integers(-1, len(r) + 1, (b, a, *grid)) for a, b, r in sides]
        one, two = (
            dense_of(k, rules, shape, block_size)
            for k, (_, _, rules) in zip(kinds, sides, strict=True)
        )
        found = joined(*kinds)
        np.testing.assert_array_equal(found[0][1], one)
        np.testing.assert_array_equal(found[1][1], two)
        heads = max(a for a, _, _ in sides)
        one, two = (d.repeat(heads // d.shape[1], 1) for d in (one, two))
        want = one & two, one | two, ~(one | two), one & ~two
        for (mask, dense), right in zip(found[2:], want, strict=True):
            np.testing.assert_array_equal(dense, right)
            check_lists(mask)

    check()


def by_block(dense, block_size, join):
    """`any` or `all` over the tokens of each block; past the end there are none."""
    t, s = dense.shape
    (bq, bkv) = block_size
    return np.array(
        [[join(dense[r : r + bq, c : c + bkv]) for c in range(0, s, bkv)] for r in range(0, t, bq)]
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("left", [None, 0, 2, 5])
@pytest.mark.parametrize("right", [None, 0, 3])
def test_blocks_of_windows_are_exact(left, right, grid):
    shape, block_size = grid
    q, k = np.mgrid[: shape[0], : shape[1]]
    dense = (k >= q - (99 if left is None else left)) & (k <= q + (99 if right is None else right))
    prefixed = dense | (k < 4)
    for rule, want in ((Window(left, right), dense), (Window(left, right) | Prefix(4), prefixed)):
        mask = BlockMask.from_rule(rule, shape, block_size)
        np.testing.assert_array_equal(mask.todense()[0, 0], want)
        np.testing.assert_array_equal(mask.block_map[0, 0], by_block(want, block_size, np.any))
        if rule == Window(left, right) or left is None:  # else two rules may fill a block together
            full = mask.kinds[0, 0] == FULL
            np.testing.assert_array_equal(full, by_block(want, block_size, np.all))


@hypothesis.given(
    st.sampled_from(list(RULES)), st.sampled_from(list(RULES)), st.sampled_from(["&", "|", "&~"])
)
def test_blocks_of_joined_rules_are_safe(one, two, join):
    shape, block_size = GRIDS[0]
    a, b = (tokens(rule, shape) for rule in (one, two))
    rule, want = {"&": (one & two, a & b), "|": (one | two, a | b), "&~": (one & ~two, a & ~b)}[
        join
    ]
    mask = BlockMask.from_rule(rule, shape, block_size)
    np.testing.assert_array_equal(mask.todense()[0, 0], want)
    assert not (by_block(want, block_size, np.any) & ~np.asarray(mask.block_map[0, 0])).any()
    assert not ((mask.kinds[0, 0] == FULL) & ~by_block(want, block_size, np.all)).any()


def test_masks_of_windows_join_to_a_window():
    shape, block_size = GRIDS[1]
    mask = BlockMask.from_rule(CAUSAL, shape, block_size)
    band = BlockMask.from_rule(Window(3, 2), shape, block_size)
    assert set((mask & band).rules) == {CAUSAL, Window(3, 2), Window(3, 0)}
    assert (mask & mask).rules == (CAUSAL,)


def test_q_offset_shifts_queries():
    mask = BlockMask.from_rule(CAUSAL, (3, 8), (2, 2), q_offset=5)
    q, k = np.mgrid[5:8, :8]
    np.testing.assert_array_equal(mask.todense()[0, 0], k <= q)
    assert mask.by_query.full[0, 0].tolist() == [3, 4]


def test_dense_round_trip(key):
    shape, block_size = GRIDS[0]
    block_map = jax.random.bernoulli(key, 0.5, (2, 3, 4, 4))
    mask = BlockMask.from_dense(block_map, block_size, shape=shape)
    assert mask.heads == 3 and mask.grid == (4, 4) and mask.shape == shape
    np.testing.assert_array_equal(mask.block_map, block_map)
    check_lists(mask)
    kinds = np.where(block_map, 1, NONE)
    with_rule = BlockMask.from_dense(block_map, block_size, shape=shape, rule=CAUSAL)
    np.testing.assert_array_equal(with_rule.todense(), dense_of(kinds, [CAUSAL], shape, block_size))
    again = BlockMask.from_dense(mask.block_map, block_size, shape=shape)
    chex.assert_trees_all_equal(mask, again)


def test_lists_round_trip(key):
    shape, block_size = GRIDS[0]
    block_map = jax.random.bernoulli(key, 0.5, (1, 2, 4, 4))
    block_map = block_map.at[..., 0, :].set(False).at[..., 1, :].set(True)  # none, all
    mask = BlockMask.from_dense(block_map, block_size, shape=shape, rule=CAUSAL)
    order = np.random.default_rng(0).permuted(np.broadcast_to(np.arange(4), (1, 2, 4, 4)), axis=-1)
    valid = np.take_along_axis(np.asarray(block_map), order, -1)
    junk = np.where(valid, order, 77)  # what is not valid may be anything
    again = BlockMask.from_lists(junk, valid, shape, block_size, rule=CAUSAL)
    chex.assert_trees_all_equal(mask, again)


def test_heads_side_by_side():
    shape, block_size = GRIDS[0]
    one = BlockMask.from_rule(CAUSAL, shape, block_size)
    two = BlockMask.from_dense(np.ones((2, 2, 4, 4), bool), block_size, shape=shape, rule=BAND)
    mask = BlockMask.from_heads([two, one])
    want = [tokens(BAND, shape), tokens(BAND, shape), tokens(CAUSAL, shape)]
    np.testing.assert_array_equal(mask.todense(), np.broadcast_to(want, (2, 3, *shape)))
    check_lists(mask)


def test_capacity():
    block_map = jnp.tril(jnp.ones((4, 4), bool))
    mask = BlockMask.from_dense(block_map, (2, 2), capacity=4, rule=CAUSAL)
    assert mask.by_query.index.shape[-1] == 4
    narrow = BlockMask.from_dense(jnp.eye(4, dtype=bool), (2, 2), capacity=1)
    assert narrow.by_query.index.shape[-1] == 1 and narrow.by_key.index.shape[-1] == 4
    np.testing.assert_array_equal(narrow.block_map[0, 0], np.eye(4, dtype=bool))
    with pytest.raises(ValueError, match="lists more than capacity=2 blocks"):
        BlockMask.from_dense(block_map, (2, 2), capacity=2)
    cut = jax.jit(lambda m: BlockMask.from_dense(m, (2, 2), capacity=2, rule=CAUSAL))(block_map)
    want = np.tril(np.ones((4, 4), bool)) & (np.arange(4) < 2)  # full ones before the diagonal
    np.testing.assert_array_equal(cut.block_map[0, 0], want)
    check_lists(cut)


BAD = {
    "capacity": (
        lambda x: BlockMask.from_dense(x > 0, (2, 2), capacity=1),
        jnp.ones((2, 2)),
        "lists more than capacity=1",
    ),
    "too high": (
        lambda x: BlockMask.from_lists(x, True, (4, 4), (2, 2)),
        jnp.full((1, 1, 2, 1), 2),
        "must be 0 to 1 where valid",
    ),
    "negative": (
        lambda x: BlockMask.from_lists(x, True, (4, 4), (2, 2)),
        jnp.full((1, 1, 2, 1), -1),
        "must be 0 to 1 where valid",
    ),
    "twice": (
        lambda x: BlockMask.from_lists(x, True, (4, 4), (2, 2)),
        jnp.zeros((1, 1, 2, 2), int),
        "listed twice",
    ),
    "no rule": (
        lambda x: BlockMask.from_kinds(x, (4, 4), (2, 2), rules=(CAUSAL,)),
        jnp.full((1, 1, 2, 2), 2),
        "must be -1 to 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    build, values, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build(values)
    error, _ = jax.jit(checkify.checkify(build))(values)
    assert message in error.get()
    jax.jit(build)(values)  # without checkify nothing is raised


def test_bad_sizes():
    square = BlockMask.from_rule(CAUSAL, (8, 8), (2, 2))
    three = BlockMask.from_dense(np.ones((1, 3, 4, 4), bool), (2, 2))
    two = BlockMask.from_dense(np.ones((2, 2, 4, 4), bool), (2, 2))
    other = BlockMask.from_rule(CAUSAL, (8, 8), (4, 2))
    for build, message in (
        (lambda: BlockMask.from_dense(np.ones((4, 4)), (2, 2)), "block_map must be bool"),
        (lambda: BlockMask.from_dense(np.ones(4, bool), (2, 2)), "block_map must be bool"),
        (
            lambda: BlockMask.from_dense(np.ones((4, 4), bool), (2, 2), shape=(8, 9)),
            r"\(4, 5\) blocks; block_map is",
        ),
        (
            lambda: BlockMask.from_dense(np.ones((4, 4), bool), (2, 2), capacity=0),
            "capacity must be at least 1",
        ),
        (lambda: BlockMask.from_rule(CAUSAL, (0, 8), (2, 2)), "must be positive"),
        (lambda: BlockMask.from_rule(CAUSAL, (8, 8), (2, 0)), "must be positive"),
        (
            lambda: BlockMask.from_lists(np.zeros((1, 1, 3, 1), int), True, (8, 8), (2, 2)),
            "4 query blocks",
        ),
        (
            lambda: BlockMask.from_kinds(np.zeros((1, 1, 3, 4), int), (8, 8), (2, 2)),
            "kinds must be",
        ),
        (lambda: BlockMask.from_heads([]), "at least one mask"),
        (lambda: BlockMask.from_heads([square, other]), "one shape and one block_size"),
        (lambda: square & other, "one shape and one block_size"),
        (lambda: two | three, "heads of one divide those of the other"),
        (
            lambda: two & BlockMask.from_dense(np.ones((3, 1, 4, 4), bool), (2, 2)),
            "as many batch entries or 1",
        ),
        (lambda: Window(-3, 1), "left . right >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(TypeError):
        square & 1


def test_jit_with_changing_maps(key):
    shape, block_size = GRIDS[0]

    @jax.jit
    @chex.assert_max_traces(1)
    def step(block_map):
        mask = BlockMask.from_dense(block_map, block_size, shape=shape, rule=CAUSAL)
        return mask | BlockMask.from_rule(BAND, shape, block_size)

    for k in jax.random.split(key, 3):
        block_map = jax.random.bernoulli(k, 0.3, (1, 2, 4, 4))
        mask = step(block_map)
        want = dense_of(np.where(block_map, 1, NONE), [CAUSAL], shape, block_size)
        np.testing.assert_array_equal(mask.todense(), want | tokens(BAND, shape))


def test_vmap_and_scan(key):
    shape, block_size = GRIDS[0]
    maps = jax.random.bernoulli(key, 0.5, (3, 1, 2, 4, 4))

    def build(block_map):
        mask = BlockMask.from_dense(block_map, block_size, shape=shape, rule=CAUSAL, capacity=4)
        return ~mask

    mapped = jax.vmap(build)(maps)
    _, scanned = jax.lax.scan(lambda state, m: (state, build(m)), 0, maps)
    chex.assert_trees_all_equal(mapped, scanned)
    for i, one in enumerate(maps):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], mapped), build(one))
    dense = jax.vmap(BlockMask.todense)(mapped)
    assert dense.shape == (3, 1, 2, *shape)


def test_density():
    causal = BlockMask.from_rule(CAUSAL, (8, 8), (2, 2))
    assert float(causal.density()) == 10 / 16 and float(causal.density(causal=True)) == 1
    window = BlockMask.from_rule(Window(1, 0), (8, 8), (2, 2))
    assert float(window.density(causal=True)) == np.float32(7 / 10)
    everything = BlockMask.from_rule(Prefix(8), (8, 8), (2, 2))
    assert float(everything.density()) == float(everything.density(causal=True)) == 1
    heads = BlockMask.from_heads([causal, window])
    assert float(heads.density()) == np.float32((10 + 7) / 32)
    assert float((~everything).density()) == 0


def test_pytree():
    mask = BlockMask.from_rule(CAUSAL, *GRIDS[0])
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 8 and all(leaf.dtype == jnp.int32 for leaf in leaves)
    chex.assert_trees_all_equal(jax.tree.unflatten(tree, leaves), mask)
    assert tree == jax.tree.structure(BlockMask.from_rule(Window(None, 0), *GRIDS[0]))
    assert tree != jax.tree.structure(BlockMask.from_rule(BAND, *GRIDS[0]))
