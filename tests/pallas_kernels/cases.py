"""Operands for the cases of `block_sparse_matmul`, and the answers by numpy."""

from experiments.check_kernels import error, operands, oracle

__all__ = ["assert_close", "operands", "oracle"]


def assert_close(got, want, tolerance):
    assert error(got, want) <= tolerance
