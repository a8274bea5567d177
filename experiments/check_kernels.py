"""Are the kernels of this device right: every case against numpy, y, dx and dw.

Imports only `pallas_kernels`, jax and numpy; tests and `bench_tpu` share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Topology, block_sparse_matmul, plan
from pallas_kernels._block_sparse_matmul import CASES
from pallas_kernels._op import here

Operands = tuple[jax.Array, jax.Array, jax.Array, Topology]


def operands(case: Any, seed: int = 0) -> Operands:
    """Random x [M, K], values [S, bk, bn] with NaN in slots not in use, dy [M, N], topology."""
    rng = np.random.default_rng(seed)
    (r, c), (bk, bn) = case.grid, case.block
    width = round(case.density * r) if case.fan_in else None
    if width is not None:
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


def oracle(x: Any, values: Any, dy: Any, topology: Topology) -> tuple[np.ndarray, ...]:
    """The dense weight, y, dx, dvalues by numpy in float32."""
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


def error(got: Any, want: Any) -> float:
    """Largest difference over the largest entry of `want`; NaN if there is one in `got`."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    if got.shape != want.shape:
        raise ValueError(f"the result has shape {got.shape}, and should have {want.shape}")
    return float(np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30))


def run(x: jax.Array, values: jax.Array, dy: jax.Array, topology: Topology) -> tuple[Any, ...]:
    """y, dx and dvalues by the public function, on this device."""
    y, pull = jax.vjp(lambda x, values: block_sparse_matmul(x, values, topology), x, values)
    return y, *pull(dy)


def check_all(cases: Sequence[Any] = CASES, run: Callable[..., tuple[Any, ...]] = run) -> list[str]:
    """Print a line a case; returns the names of those that fail.

    Args:
        cases: What to check.
        run: (x, values, dy, topology) -> y, dx, dvalues.
    """
    wrong = []
    print(f"y, dx and dw against numpy ({here()} on {jax.devices()[0].device_kind})")
    for case in cases:
        x, values, dy, topology = operands(case)
        # float32 products on a TPU are of bfloat16 unless one asks for more.
        with jax.default_matmul_precision("highest"):
            got = jax.jit(run)(x, values, dy, topology)
        errors = [
            error(a, b) for a, b in zip(got, oracle(x, values, dy, topology)[1:], strict=True)
        ]
        fine = all(e <= case.tolerance for e in errors)
        fine = fine and not np.asarray(got[2])[~np.asarray(topology.used)].any()
        figures = "  ".join(f"{e:.1e}" for e in errors)
        print(f"  {'ok   ' if fine else 'WRONG'} {case.name:40} {figures}", flush=True)
        wrong += [] if fine else [case.name]
    return wrong
