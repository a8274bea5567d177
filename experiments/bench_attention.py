"""What block-sparse attention costs: dense time over block-sparse time, in one run on one device.

Causal, against `jax.nn.dot_product_attention` (cuDNN on a GPU that has it) and against our own
kernel on the full causal mask. Blocks of the triangle are kept at random, always the diagonal, and
`kept` is what is really kept of it. All runs take turns and each figure is of the best round.
Results are checked against dense attention first. Then: how long the device takes to build a mask.
Imports only `pallas_kernels`, jax and numpy, so that it runs wherever those are.

    python -m experiments.bench_attention [--quick] [--rounds 10] [--lengths 4096] [--heads 4 4]
        [--width 128] [--block 128] [--dtype float32] [--out results.json]

On a CPU it starts again with an allocator that keeps freed memory, for dense and sparse alike: else
page faults of fresh buffers are part of both times; and our kernel is compared with itself in time
of the processors, since other work on the machine disturbs the clock. On a GPU or TPU the defaults
are bfloat16, 16 heads and 8192 to 32768 tokens. Where dense attention does not fit the memory, its
columns are empty.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.allocator import keep_freed_memory
from experiments.bench_kernels import seconds, setting
from pallas_kernels import BlockMask, block_sparse_attention
from pallas_kernels._attention_plan import Extras, Form, refined

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
PASSES = ("forward", "forward + backward")


def passes(attend: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    """Compiled (q, k, v, dout, *mask) -> out; and -> out, dq, dk, dv."""

    def both(q: Any, k: Any, v: Any, dout: Any, *mask: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *mask), q, k, v)
        return out, *pull(dout)

    forward = lambda q, k, v, dout, *mask: attend(q, k, v, *mask)  # noqa: E731
    return dict(zip(PASSES, (jax.jit(forward), jax.jit(both)), strict=True))


def dense_attention() -> Callable[..., jax.Array]:
    """Causal attention of JAX; by cuDNN on a GPU where that works."""
    attend = partial(jax.nn.dot_product_attention, is_causal=True)
    if jax.default_backend() == "gpu":
        cudnn = partial(attend, implementation="cudnn")
        try:
            jax.block_until_ready(cudnn(*[jnp.zeros((1, 256, 1, 128), jnp.bfloat16)] * 3))
            return cudnn
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"no cuDNN attention here: {error}".splitlines()[0])
    return attend


def random_map(blocks: int, heads: int, sparsity: float, seed: int = 0) -> np.ndarray:
    """Bool [1, heads, blocks, blocks]: the diagonal, and blocks below it, as many as asked for."""
    rng = np.random.default_rng(seed)
    below = np.flatnonzero(np.tri(blocks, k=-1))
    kept = max(0, round((1 - sparsity) * (len(below) + blocks)) - blocks)
    maps = np.tile(np.eye(blocks, dtype=bool), (heads, 1, 1))
    for one in maps.reshape(heads, -1):
        one[rng.choice(below, kept, replace=False)] = True
    return maps[None]


def build(block_map: jax.Array, block: int, length: int) -> tuple[Any, Any]:
    """All that the device does to a new map before attention begins."""
    mask = BlockMask.from_dense(block_map, (block, block))
    form = Form((block, block), (length, length), (), True, 1.0)
    return refined(mask, form, Extras(jnp.zeros(1, jnp.int32)))


def best(runs: dict[Any, Callable[[], Any]], rounds: int) -> tuple[dict[Any, float], ...]:
    """Seconds of each, and those of the processors; the least of rounds in turns.

    NaN for what does not run. On a busy machine the time of the processors is the steadier figure.
    """
    times: dict[Any, float] = {}
    used: dict[Any, float] = {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            if np.isnan(times.get(name, 0.0)):
                continue
            try:
                begin = time.process_time()
                taken = seconds(run)
                busy = time.process_time() - begin
            except jax.errors.JaxRuntimeError as error:
                print(f"{name}: {error}".splitlines()[0])
                times[name] = used[name] = float("nan")
                continue
            if turn:  # the first compiles
                times[name] = min(taken, times.get(name, taken))
                used[name] = min(busy, used.get(name, busy))
    return times, used


def table(options: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """Measure and print all sparsities of one length."""
    (heads, kv_heads), d, block = options.heads, options.width, options.block
    dtype = jnp.dtype(options.dtype)
    rng = np.random.default_rng(0)
    normal = lambda h: jnp.asarray(rng.standard_normal((1, length, h, d)), dtype)  # noqa: E731
    arrays = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    dense = passes(dense_attention())
    sparse = passes(
        lambda q, k, v, mask: block_sparse_attention(
            q, k, v, mask, causal=True, implementation=options.implementation
        )
    )
    blocks = length // block
    triangle = blocks * (blocks + 1) / 2
    runs: dict[Any, Callable[[], Any]] = {("dense", p): partial(dense[p], *arrays) for p in PASSES}
    masks, kept = {}, {}
    for sparsity in (0.0, *SPARSITIES):
        for name, mask_heads in (("one mask", 1), ("a mask a head", heads)):
            block_map = random_map(blocks, mask_heads, sparsity)
            kept[sparsity] = float(block_map.sum() / mask_heads / triangle)
            mask = jax.jit(partial(BlockMask.from_dense, block_size=(block, block)))(block_map)
            masks[sparsity, name] = mask
            for p in PASSES:
                runs[sparsity, name, p] = partial(sparse[p], *arrays, mask)
    check(runs, dtype)
    times, used = best(runs, options.rounds)
    clock = used if jax.default_backend() == "cpu" else times
    print(f"T={length}: dense time / time, and time of the full causal mask / time x kept")
    print("sparsity     kept  masks          " + "".join(f"{p:>27}" for p in PASSES))
    rows = []
    for sparsity, name in masks:
        row: dict[str, Any] = {
            "length": length,
            "sparsity": sparsity,
            "kept": kept[sparsity],
            "masks": name,
        }
        line = f"{sparsity:8.0%}  {kept[sparsity]:7.2%}  {name:15}"
        for p in PASSES:
            own = times[sparsity, name, p]
            full = clock[0.0, name, p] / clock[sparsity, name, p]
            row[f"{p}, ms"] = 1e3 * own
            row[f"{p}, dense ms"] = 1e3 * times["dense", p]
            row[f"{p}, processors ms"] = 1e3 * used[sparsity, name, p]
            row[f"{p}, dense processors ms"] = 1e3 * used["dense", p]
            row[f"{p}, over dense"] = times["dense", p] / own
            row[f"{p}, over full"] = full
            row[f"{p}, of ideal"] = full * kept[sparsity]
            line += f"{row[f'{p}, over dense']:8.2f} {row[f'{p}, over full']:8.2f} "
            line += f"({row[f'{p}, of ideal']:.2f}) "
        print(line, flush=True)
        rows.append({k: None if v != v else v for k, v in row.items()})
    return rows


def check(runs: dict[Any, Callable[[], Any]], dtype: Any) -> None:
    """Leave if attention on the full mask is not dense attention."""
    for p in PASSES:
        try:
            want = jax.tree.leaves(runs["dense", p]())
        except jax.errors.JaxRuntimeError:  # too large
            continue
        for name in ("one mask", "a mask a head"):
            for got, expected in zip(jax.tree.leaves(runs[0.0, name, p]()), want, strict=True):
                got, expected = (np.asarray(x, np.float32) for x in (got, expected))
                error = float(np.abs(got - expected).max() / np.abs(expected).max())
                if not error < (1e-4 if dtype == jnp.float32 else 5e-2):
                    raise SystemExit(f"wrong {p} with {name}: relative error {error}")


def building(options: argparse.Namespace, length: int) -> dict[str, Any]:
    """Milliseconds to build a mask of 95 % a head, and its share of the attention it guides."""
    (heads, kv_heads), d, block = options.heads, options.width, options.block
    block_map = jnp.asarray(random_map(length // block, heads, 0.95))
    mask = jax.jit(partial(BlockMask.from_dense, block_size=(block, block)))(block_map)
    shape = lambda h: jnp.ones((1, length, h, d), options.dtype)  # noqa: E731
    arrays = shape(heads), shape(kv_heads), shape(kv_heads), shape(heads)
    sparse = passes(
        lambda q, k, v, mask: block_sparse_attention(
            q, k, v, mask, causal=True, implementation=options.implementation
        )
    )
    runs: dict[Any, Callable[[], Any]] = {p: partial(sparse[p], *arrays, mask) for p in PASSES}
    make = jax.jit(partial(build, block=block, length=length))
    times, _ = best({"build": partial(make, block_map), **runs}, min(options.rounds, 5))
    row = {"length": length, "build, ms": 1e3 * times["build"]}
    for p in PASSES:
        row[f"share of {p}"] = times["build"] / times[p]
    print(f"T={length}, 95 %, a mask a head: built in {row['build, ms']:.1f} ms, ", end="")
    print(", ".join(f"{row[f'share of {p}']:.1%} of {p}" for p in PASSES), flush=True)
    return row


def main() -> None:
    """Measure, print the tables, and keep them."""
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one length, few rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--heads", type=int, nargs=2, default=(4, 4) if cpu else (16, 16))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--dtype", default="float32" if cpu else "bfloat16")
    parser.add_argument("--implementation")
    parser.add_argument("--no-build", action="store_true", help="do not time building a mask")
    parser.add_argument("--out")
    options = parser.parse_args()
    if cpu:
        keep_freed_memory()
    options.rounds = options.rounds or (3 if options.quick else 10)
    lengths = (2048,) if options.quick else (4096,) if cpu else (8192, 16384, 32768)
    options.lengths = options.lengths or list(lengths)
    here_and_now = setting() | {k: v for k, v in vars(options).items() if k not in ("out", "quick")}
    here_and_now["load"] = round(os.getloadavg()[0], 1)
    print("\n".join(f"{key}: {value}" for key, value in here_and_now.items()), flush=True)
    rows = [row for length in options.lengths for row in table(options, length)]
    built = None
    if not options.no_build:
        built = building(options, 8192 if options.quick else 32768)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(
                {"setting": here_and_now, "measured": rows, "building": built}, file, indent=1
            )
            file.write("\n")


if __name__ == "__main__":
    main()
