"""A product too large for a TPU core goes to the XLA form, if no implementation is asked for."""

import pytest

from pallas_kernels import _block_sparse_tpu as tiles
from pallas_kernels import _op, block_sparse_matmul
from pallas_kernels._block_sparse_matmul import CASES
from pallas_kernels._compat import Tpu
from tests.pallas_kernels.cases import assert_close, operands, oracle


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("tpu", lambda: Tpu(vmem=2**19), "holds 8 rows of x in VMEM at least"),
        ("MOST_PREFETCHED", 40, "holds its lists in scalar memory, 40 integers; 12 slots"),
    ],
)
def test_it_is_said_and_right(monkeypatch, name, value, reason):
    x, values, dy, topology = operands(CASES[0])
    monkeypatch.setattr(_op, "here", lambda: "tpu")
    assert not tiles.too_large(x.shape[0], topology, values.shape[1:], x.dtype)
    monkeypatch.setattr(tiles, name, value)
    with pytest.warns(UserWarning, match=f"implementation='xla' is taken here, .*{reason}"):
        y = block_sparse_matmul(x, values, topology)
    assert_close(y, oracle(x, values, dy, topology)[1], CASES[0].tolerance)
