"""What block-sparse products cost: dense time over block-sparse time, in one run on one device.

All runs take turns, dense beside sparse; each figure is the median over rounds of their ratio.
Every column of blocks stores as many blocks. Results are checked against the dense product first.
Imports only `pallas_kernels`, jax and numpy, so that it runs wherever those are.

    python -m experiments.bench_kernels [--rounds 15] [--shape 512 2560 2560] [--block 128 128]
        [--dtype float32] [--out experiments/results/bench_kernels_cpu.json]

On a CPU it starts again with an allocator that keeps freed memory, for dense and sparse alike: else
page faults of fresh buffers are part of both times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.allocator import keep_freed_memory
from pallas_kernels import Topology, block_sparse_matmul, plan, todense
from pallas_kernels._op import here

DENSITIES = (0.5, 0.2, 0.1, 0.05)


def seconds(fn: Callable[..., Any], *arguments: Any) -> float:
    """Of one call."""
    begin = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - begin


def passes(multiply: Callable[[Any, Any, bool], Any]) -> dict[str, Callable[..., Any]]:
    """Compiled (x, w, dy) -> y; y, dx and dw; dx; dw. `multiply` is (x, w, transpose) -> x @ w."""

    def both(x: Any, w: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: multiply(x, w, False), x, w)
        return y, *pull(dy)

    def dw(x: Any, w: Any, dy: Any) -> Any:
        return jax.vjp(lambda w: multiply(x, w, False), w)[1](dy)[0]

    return {
        "forward": jax.jit(lambda x, w, dy: multiply(x, w, False)),
        "forward + backward": jax.jit(both),
        "dx": jax.jit(lambda x, w, dy: multiply(dy, w, True)),
        "dw": jax.jit(dw),
    }


def random_problem(
    shape: tuple[int, int, int], block: tuple[int, int], density: float, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, Topology]:
    """x, values, dy and a topology that stores as many random blocks in every block column."""
    (m, k, n), (bk, bn) = shape, block
    r, c = k // bk, n // bn
    fan_in = max(1, round(density * r))
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(r)[:fan_in] for _ in range(c)])
    topology = plan(jnp.asarray(rows), jnp.repeat(jnp.arange(c), fan_in), (r, c), fan_in=fan_in)
    x, dy = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((m, k), (m, n)))
    values = jnp.asarray(rng.standard_normal((c * fan_in, bk, bn)), dtype)
    return x, values, dy, topology


def stored(w: jax.Array, topology: Topology, block: tuple[int, int]) -> jax.Array:
    """The blocks [S, bk, bn] of a dense array [K, N] at the places of a topology."""
    (r, c), (bk, bn) = topology.grid, block
    return w.reshape(r, bk, c, bn).swapaxes(1, 2)[topology.rows, topology.cols]


def checked(
    dense: dict[str, Callable[..., Any]],
    shape: tuple[int, int, int],
    block: tuple[int, int],
    density: float,
    dtype: Any,
) -> tuple[dict[str, float], dict[str, list[Callable[[], Any]]]]:
    """Size of a problem, and by name its dense and its sparse run, compiled, with right results.

    `dense` are the `passes` of a dense weight, which all problems of a shape share.
    """
    x, values, dy, topology = random_problem(shape, block, density, dtype)
    w = todense(values, topology)
    sparse = passes(
        lambda x, values, transpose: block_sparse_matmul(x, values, topology, transpose=transpose)
    )
    for name in dense:
        got, want = sparse[name](x, values, dy), dense[name](x, w, dy)
        if name != "forward + backward":  # its parts are checked one by one
            want = stored(want, topology, block) if name == "dw" else want
            got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
            error = float(np.abs(got - want).max() / np.abs(want).max())
            if not error < (1e-4 if dtype == jnp.float32 else 2e-2):
                raise SystemExit(f"wrong {name} at density {density}: relative error {error}")
    fan_in = topology.slots // topology.grid[1]
    runs = {
        name: [partial(dense[name], x, w, dy), partial(sparse[name], x, values, dy)]
        for name in dense
    }
    return {"fan_in": fan_in, "density": fan_in / topology.grid[0]}, runs


def setting() -> dict[str, Any]:
    """What figures depend on beside the problem."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "implementation": here(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "runtime": device.client.platform_version,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(
    shape: tuple[int, int, int],
    block: tuple[int, int],
    dtype: Any,
    rounds: int,
    densities: Sequence[float] = DENSITIES,
) -> list[dict[str, float]]:
    """Measure and print. A round runs everything once, so that a busy moment meets few of each."""
    dense = passes(lambda x, w, transpose: x @ (w.T if transpose else w))
    problems = [checked(dense, shape, block, density, dtype) for density in densities]
    times: dict[tuple[int, str], list[list[float]]] = {}
    for turn in range(rounds + 1):
        for i, (_, runs) in enumerate(problems):
            for name, pair in runs.items():
                taken = [seconds(run) for run in pair]
                if turn:  # the first warms up
                    times.setdefault((i, name), []).append(taken)
    print(
        "(dense time / sparse time)\nsparsity  blocks a column  forward  forward + backward  dx  dw"
    )
    rows = []
    for i, (row, runs) in enumerate(problems):
        for name in runs:
            row[name] = statistics.median(a / b for a, b in times[i, name])
            row[f"{name}, dense ms"] = 1e3 * statistics.median(a for a, _ in times[i, name])
        rows.append(row)
        print(
            f"{1 - row['density']:8.0%}  {row['fan_in']:15}  {row['forward']:7.2f}  "
            f"{row['forward + backward']:18.2f}  {row['dx']:.2f}  {row['dw']:.2f}",
            flush=True,
        )
    return rows


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
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    here_and_now = setting() | {
        "shape": list(options.shape),
        "block": list(options.block),
        "dtype": options.dtype,
        "rounds": options.rounds,
    }
    print("\n".join(f"{key}: {value}" for key, value in here_and_now.items()), flush=True)
    rows = table(
        tuple(options.shape), tuple(options.block), jnp.dtype(options.dtype), options.rounds
    )
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"setting": here_and_now, "measured": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
