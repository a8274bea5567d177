"""What decode attention to some pages costs: dense time over sparse time, in one run on one device.

Dense attention reads the whole cache, as plain products over keys and values stored head by head,
the fastest form that was found; `library ms` is `jax.nn.dot_product_attention`. A sparse call reads
1/4, 1/8 and 1/16 of the pages, random ones, others for each key head. All runs take turns, dense
beside sparse; each figure is the median over rounds of their ratio. `bytes` are those of the keys
and values that a call has to read, `temporary bytes` what the compiled program takes beside its
operands. Results are checked against softmax over the same pages first. Imports only
`pallas_kernels`, jax and numpy.

    python -m experiments.bench_decode [--rounds 15] [--length 32768] [--page 64]
        [--out experiments/results/bench_decode_cpu.json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.allocator import keep_freed_memory
from pallas_kernels import sparse_decode_attention
from pallas_kernels._op import here
from pallas_kernels._sparse_decode import reference

SHARES = (4, 8, 16)


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One token [B, 1, H, D] to all keys [B, H_kv, S, D]."""
    b, _, h, d = q.shape
    rows = q.reshape(b, k.shape[1], -1, d)  # with an axis for the one token it takes twice as long
    scores = jnp.einsum("bkgd,bksd->bkgs", rows, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * d**-0.5, -1).astype(v.dtype)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, 1, h, d).astype(q.dtype)


def library_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same by `jax.nn.dot_product_attention`, keys [B, S, H_kv, D]."""
    return jax.nn.dot_product_attention(q, k, v)


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def setting() -> dict[str, Any]:
    """What figures depend on beside the problem."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "implementation": here(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(
    batch: int, length: int, heads: tuple[int, int], d: int, page: int, dtype: Any, rounds: int
) -> list[dict[str, Any]]:
    """Measure and print. A round runs everything once, so that a busy moment meets few of each."""
    (h, kv_heads), places = heads, length // page
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)  # noqa: E731
    q, cache = normal(batch, 1, h, d), normal(batch * places, kv_heads, 2, page, d)
    block_table = jnp.asarray(rng.permutation(batch * places).reshape(batch, places), jnp.int32)
    positions = jnp.full((batch, 1), length - 1, jnp.int32)
    stored = cache[block_table].transpose(3, 0, 2, 1, 4, 5)  # [2, B, H_kv, places, page, D]
    k, v = stored.reshape(2, batch, kv_heads, length, d)
    dense = partial(jax.jit(dense_attention), q, k, v)
    library = partial(jax.jit(library_attention), q, k.swapaxes(1, 2), v.swapaxes(1, 2))
    problems = []
    for share in SHARES:
        p = places // share
        lists = [rng.permutation(places)[:p] for _ in range(batch * kv_heads)]
        ids = jnp.asarray(np.reshape(lists, (batch, kv_heads, p)), jnp.int32)
        operands = q, cache, ids, jnp.full((batch, kv_heads), p, jnp.int32), block_table, positions
        run = jax.jit(sparse_decode_attention)
        want = np.asarray(jax.jit(reference)(*operands)[0])
        error = np.abs(np.asarray(run(*operands), np.float32) - want).max() / np.abs(want).max()
        if not error < (1e-4 if dtype == jnp.float32 else 2e-2):
            raise SystemExit(f"wrong at 1/{share} of the pages: relative error {error}")
        memory = run.lower(*operands).compile().memory_analysis()
        read = batch * kv_heads * p * page * 2 * d * cache.dtype.itemsize
        temporary = memory.temp_size_in_bytes if memory else None
        row = {"share": f"1/{share}", "pages": p, "bytes": read, "temporary bytes": temporary}
        problems.append((row, partial(run, *operands)))
    times: list[list[tuple[float, float]]] = [[] for _ in problems]
    libraries = []
    for turn in range(rounds + 1):
        for taken, (_, run) in zip(times, problems, strict=True):
            pair = seconds(dense), seconds(run)
            if turn:  # the first warms up
                taken.append(pair)
        if turn and len(libraries) < 3:
            libraries.append(seconds(library))
    print("share  pages  ideal  dense / sparse  dense ms  sparse ms  sparse GB/s  dense GB/s")
    rows = []
    for share, taken, (row, _) in zip(SHARES, times, problems, strict=True):
        base, own = (statistics.median(t) for t in zip(*taken, strict=True))
        row["speedup"] = round(statistics.median(a / b for a, b in taken), 2)
        row["speedup, best over best"] = round(
            min(a for a, _ in taken) / min(b for _, b in taken), 2
        )
        row |= {"dense ms": round(1e3 * base, 3), "sparse ms": round(1e3 * own, 3)}
        row |= {"best dense ms": round(1e3 * min(a for a, _ in taken), 3)}
        row["library ms"] = round(1e3 * min(libraries), 3)
        rows.append(row)
        print(
            f"{row['share']:>5} {row['pages']:6} {share:6} {row['speedup']:15.2f} "
            f"{row['dense ms']:9.2f} {row['sparse ms']:10.2f} {row['bytes'] / own / 1e9:12.1f} "
            f"{row['bytes'] * share / base / 1e9:11.1f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure, print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8))
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out")
    options = parser.parse_args()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    problem = {name: value for name, value in vars(options).items() if name != "out"}
    kept = setting() | problem
    print("\n".join(f"{key}: {value}" for key, value in kept.items()), flush=True)
    rows = table(
        options.batch,
        options.length,
        tuple(options.heads),
        options.d,
        options.page,
        jnp.dtype(options.dtype),
        options.rounds,
    )
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"setting": kept, "measured": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
