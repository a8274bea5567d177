"""Every updater x pattern x optimizer x tree x dtype x packing, pairwise, by one check."""

import pytest

from jaxsparse import testing
from tests.conformance.lists import (
    DTYPES,
    OPTIMIZERS,
    PACKED,
    PATTERNS,
    TREES,
    UPDATERS,
    fast_jit,
    make_params,
    make_updater,
    pairwise,
)

FACTORS = (OPTIMIZERS, UPDATERS, PATTERNS, TREES, DTYPES, PACKED)
ROWS = pairwise(*FACTORS)


@pytest.mark.parametrize(
    ("optimizer", "updater", "pattern", "tree", "dtype", "packed"),
    ROWS,
    ids=["-".join(row) for row in ROWS],
)
def test_contract(optimizer, updater, pattern, tree, dtype, packed):
    params = make_params(tree, DTYPES[dtype])
    built, plan = make_updater(updater, PATTERNS[pattern], params)
    testing.check_updater(
        built,
        OPTIMIZERS[optimizer].inner,
        params,
        plan=plan,
        moves=UPDATERS[updater].moves,
        packed=PACKED[packed],
        wrap=OPTIMIZERS[optimizer].wrap,
        micro_steps=OPTIMIZERS[optimizer].micro_steps,
        floor=OPTIMIZERS[optimizer].floor,
        forms=False,
        jit=fast_jit,
    )


@pytest.mark.parametrize(
    ("updater", "pattern"), list(zip(UPDATERS, list(PATTERNS) * 2, strict=False))
)
def test_packed_and_eager_give_the_same(updater, pattern):
    params = make_params()
    built, _ = make_updater(updater, PATTERNS[pattern], params)
    testing.check_updater(built, OPTIMIZERS["adam"].inner, params, jit=fast_jit)


def test_the_cover_holds_every_pair_and_stays_small():
    assert len(ROWS) <= 260
    for i, first in enumerate(FACTORS):
        for j, second in enumerate(FACTORS[:i]):
            covered = {(row[i], row[j]) for row in ROWS}
            assert covered == {(a, b) for a in first for b in second}
