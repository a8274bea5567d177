"""What block-sparse products cost: dense time over block-sparse time, in one run on one device.

Dense and sparse take turns; each figure is the median over rounds of the ratio within a round.
Every column of blocks stores as many blocks. Results are checked against the dense product first.
Imports only `pallas_kernels`, jax and numpy, so that it runs wherever those are.

    python -m experiments.bench_kernels [--rounds 15] [--shape 512 2560 2560] [--block 128 128]
        [--dtype float32] [--out experiments/results/bench_kernels_cpu.json]

On a CPU under Linux it starts again with GLIBC_TUNABLES that keep freed memory, for dense and
sparse alike: else page faults of fresh buffers are part of both times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sparse_matmul, plan, todense
from pallas_kernels._op import here

DENSITIES = (0.5, 0.2, 0.1, 0.05)
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=8589934592", "arena_max=1")
)


def seconds(fn: Callable[..., Any], *arguments: Any) -> float:
    """Of one call."""
    begin = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - begin


def passes(multiply: Callable[[Any, Any], Any]) -> dict[str, Callable[..., Any]]:
    """Compiled (x, w, dy) -> forward, and forward with both gradients."""

    def both(x: Any, w: Any, dy: Any) -> Any:
        y, pull = jax.vjp(multiply, x, w)
        return y, *pull(dy)

    return {
        "forward": jax.jit(lambda x, w, dy: multiply(x, w)),
        "forward + backward": jax.jit(both),
    }


def measure(
    shape: tuple[int, int, int], block: tuple[int, int], density: float, dtype: Any, rounds: int
) -> dict[str, float]:
    """Speed-ups of one density."""
    (m, k, n), (bk, bn) = shape, block
    r, c = k // bk, n // bn
    fan_in = max(1, round(density * r))
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(r)[:fan_in] for _ in range(c)])
    topology = plan(jnp.asarray(rows), jnp.repeat(jnp.arange(c), fan_in), (r, c), fan_in=fan_in)
    x, dy = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((m, k), (m, n)))
    values = jnp.asarray(rng.standard_normal((c * fan_in, bk, bn)), dtype)
    w = todense(values, topology)
    dense = passes(jnp.matmul)
    sparse = passes(lambda x, values: block_sparse_matmul(x, values, topology))
    got, want = (
        np.asarray(f(x, a, dy), np.float32)
        for f, a in ((sparse["forward"], values), (dense["forward"], w))
    )
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error < (1e-4 if dtype == jnp.float32 else 2e-2):
        raise SystemExit(f"wrong result at density {density}: relative error {error}")
    found = {"fan_in": fan_in, "density": fan_in / r}
    for name in dense:
        runs = [(dense[name], w), (sparse[name], values)]
        times: list[list[float]] = [[seconds(f, x, a, dy) for f, a in runs] for _ in range(rounds)]
        found[name] = statistics.median(a / b for a, b in times[2:])
        found[f"{name}, dense ms"] = 1e3 * statistics.median(a for a, _ in times[2:])
    return found


def main() -> None:
    """Measure, print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 2560, 2560), metavar="MKN")
    parser.add_argument("--block", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out")
    options = parser.parse_args()
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu" and sys.platform == "linux"
    if on_cpu and os.environ.get("GLIBC_TUNABLES") != ALLOCATOR:
        environment = os.environ | {"GLIBC_TUNABLES": ALLOCATOR}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    setting = {
        "device": device.device_kind,
        "implementation": here(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "shape": list(options.shape),
        "block": list(options.block),
        "dtype": options.dtype,
        "rounds": options.rounds,
    }
    print("\n".join(f"{key}: {value}" for key, value in setting.items()), flush=True)
    print("sparsity  blocks a column  forward  forward + backward  (dense time / sparse time)")
    rows = []
    for density in DENSITIES:
        row = measure(
            tuple(options.shape),
            tuple(options.block),
            density,
            jnp.dtype(options.dtype),
            options.rounds,
        )
        rows.append(row)
        print(
            f"{1 - row['density']:8.0%}  {row['fan_in']:15}  {row['forward']:7.2f}  "
            f"{row['forward + backward']:18.2f}",
            flush=True,
        )
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"setting": setting, "measured": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
