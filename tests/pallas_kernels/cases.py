"""Operands for the cases of `block_sparse_matmul`, and the answers by numpy."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import plan


def operands(case, seed=0):
    """x [M, K], values [S, bk, bn] with NaN in slots that are not in use, dy [M, N], topology."""
    rng = np.random.default_rng(seed)
    (r, c), (bk, bn) = case.grid, case.block
    width = round(case.density * r) if case.fan_in else None
    if case.fan_in:
        rows = np.concatenate([rng.permutation(r)[:width] for _ in range(c)])
        cols = np.repeat(np.arange(c), width)
    else:
        mask = rng.random((r, c)) < case.density
        mask[1 % r] = mask[:, c - 1] = False  # an empty line of each kind
        rows, cols = np.nonzero(mask)
        order = rng.permutation(len(rows))
        rows, cols = rows[order], cols[order]
        rows = np.concatenate([rows, np.full(case.spare, r)])
        cols = np.concatenate([cols, np.zeros(case.spare, int)])
    topology = plan(jnp.asarray(rows), jnp.asarray(cols), case.grid, fan_in=width)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), case.dtype)  # noqa: E731
    values = normal(len(rows), bk, bn)
    values = jnp.where(topology.used[:, None, None], values, jnp.nan)
    return normal(case.m, r * bk), values, normal(case.m, c * bn), topology


def assert_close(got, want, tolerance):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= tolerance * max(np.abs(want).max(initial=0), 1e-30)


def oracle(x, values, dy, topology):
    """y, dx, dvalues by numpy in float32."""
    x, dy = np.asarray(x, np.float32), np.asarray(dy, np.float32)
    used, (_, bk, bn) = np.asarray(topology.used), values.shape
    (r, c), blocks = topology.grid, np.nan_to_num(np.asarray(values, np.float32))
    dense = np.zeros((r, bk, c, bn), np.float32)
    rows, cols = np.asarray(topology.rows)[used], np.asarray(topology.cols)[used]
    dense[rows, :, cols] = blocks[used]
    dense = dense.reshape(r * bk, c * bn)
    slope = (x.T @ dy).reshape(r, bk, c, bn)
    dvalues = np.zeros(values.shape, np.float32)
    dvalues[used] = slope[rows, :, cols]
    return dense, x @ dense, dy @ dense.T, dvalues
