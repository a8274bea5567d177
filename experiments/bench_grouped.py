"""What a layer of experts costs without dropped tokens, against the dense layer of equal FLOPs.

Tokens, k experts each and weights of the choices go in; each form below gives the layer's output,
and gradients of tokens and of the three weights of an expert. All runs take turns; `ratio` is the
least time of a form over the least time of the dense layer, `median ratio` the median of the ratios
of the rounds. Results are checked against each other first.

    grouped        tokens sorted by expert, `grouped_ffn`, sum over the choices of a token
    sorted rows    `grouped_ffn` alone, of rows that are sorted already
    three products the same with `grouped_matmul` three times
    ragged_dot     the same with `jax.lax.ragged_dot` three times
    masked loop    a loop over experts, each of all tokens
    capacity 2     one-hot dispatch and combination by einsum, twice the mean rows for an expert

Imports only `pallas_kernels`, jax and numpy, so that it runs wherever those are.

    python -m experiments.bench_grouped [--rounds 15] [--shape 2048 512 1376] [--experts 16 2]
        [--dtype float32] [--out experiments/results/bench_grouped_cpu.json]

On a CPU it starts again with an allocator that keeps freed memory, see `bench_kernels`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import silu

from experiments.allocator import keep_freed_memory
from experiments.bench_kernels import seconds, setting
from pallas_kernels import grouped_ffn, grouped_matmul


class Problem(NamedTuple):
    """Tokens, the weights of experts, and which experts a token has with what weight."""

    x: jax.Array  # [T, D]
    gate: jax.Array  # [E, D, H]
    up: jax.Array  # [E, D, H]
    down: jax.Array  # [E, H, D]
    experts: jax.Array  # [T, k]
    weights: jax.Array  # [T, k]


def random_problem(
    shape: tuple[int, int, int], experts: tuple[int, int], dtype: Any, skew: float = 0.25
) -> Problem:
    """Random tokens that choose k of E experts by random logits; `skew` makes some favourites."""
    (t, d, h), (e, k) = shape, experts
    rng = np.random.default_rng(0)

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size) / np.sqrt(size[-2]), dtype)

    logits = jnp.asarray(rng.standard_normal((t, e)) + skew * rng.standard_normal(e))
    weights, chosen = lax.top_k(jax.nn.softmax(logits), k)
    x, gate, up, down = normal(t, d), normal(e, d, h), normal(e, d, h), normal(e, h, d)
    return Problem(
        x, gate, up, down, chosen, (weights / weights.sum(1, keepdims=True)).astype(dtype)
    )


def by_rows(ffn: Callable[..., jax.Array], p: Problem) -> jax.Array:
    """The layer, from a function of rows sorted by expert, weights and sizes."""
    (t, k), e = p.experts.shape, p.gate.shape[0]
    order = jnp.argsort(p.experts.reshape(-1))
    sizes = jnp.bincount(p.experts.reshape(-1), length=e)
    y = ffn(p.x[order // k], p.gate, p.up, p.down, sizes)
    back = jnp.argsort(order)
    return jnp.einsum("tkd,tk->td", y[back].reshape(t, k, -1), p.weights)


def three(
    product: Callable[..., jax.Array],
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    """The gated layer by three grouped products."""
    return product(silu(product(x, gate, sizes)) * product(x, up, sizes), down, sizes)


def masked_loop(p: Problem) -> jax.Array:
    """Every expert on every token, of which the chosen are kept."""

    def one(y: jax.Array, expert: Any) -> tuple[jax.Array, None]:
        i, gate, up, down = expert
        share = jnp.where(p.experts == i, p.weights, 0).sum(1)
        return y + share[:, None] * ((silu(p.x @ gate) * (p.x @ up)) @ down), None

    experts = jnp.arange(p.gate.shape[0]), p.gate, p.up, p.down
    return lax.scan(one, jnp.zeros_like(p.x), experts)[0]


def capacity(p: Problem, factor: float = 2.0) -> jax.Array:
    """Tokens copied to [E, C, D] by a product with a one-hot array; those beyond C are dropped."""
    (t, k), e = p.experts.shape, p.gate.shape[0]
    room = int(factor * t * k / e)
    chosen = jax.nn.one_hot(p.experts, e, dtype=jnp.int32).reshape(t * k, e)
    place = ((jnp.cumsum(chosen, 0) - 1) * chosen).sum(1).reshape(t, k)
    to = jax.nn.one_hot(p.experts, e, dtype=p.x.dtype)[..., None]
    to = to * jax.nn.one_hot(place, room, dtype=p.x.dtype)[:, :, None]  # [T, k, E, C]
    combine = jnp.einsum("tkec,tk->tec", to, p.weights)
    rows = jnp.einsum("tec,td->ecd", to.sum(1), p.x)
    hidden = silu(jnp.einsum("ecd,edh->ech", rows, p.gate)) * jnp.einsum("ecd,edh->ech", rows, p.up)
    return jnp.einsum("tec,ecd->td", combine, jnp.einsum("ech,ehd->ecd", hidden, p.down))


def forms(shape: tuple[int, int, int], p: Problem) -> dict[str, tuple[Callable[..., Any], Problem]]:
    """By name (layer, its operands)."""
    (t, d, h), (e, k) = shape, (p.gate.shape[0], p.experts.shape[1])
    wide = random_problem((t, d, k * h), (1, 1), p.x.dtype)
    order = jnp.argsort(p.experts.reshape(-1))
    sizes = jnp.bincount(p.experts.reshape(-1), length=e)
    rows = p._replace(x=p.x[order // k], experts=sizes)
    ragged = partial(three, lax.ragged_dot)
    return {
        "dense": (lambda p: (silu(p.x @ p.gate[0]) * (p.x @ p.up[0])) @ p.down[0], wide),
        "grouped": (partial(by_rows, grouped_ffn), p),
        "sorted rows": (lambda p: grouped_ffn(p.x, p.gate, p.up, p.down, p.experts), rows),
        "three products": (partial(by_rows, partial(three, grouped_matmul)), p),
        "ragged_dot": (partial(by_rows, ragged), p),
        "masked loop": (masked_loop, p),
        "capacity 2": (capacity, p),
    }


def passes(layer: Callable[[Problem], jax.Array]) -> dict[str, Callable[..., Any]]:
    """Compiled: the output; the output and all gradients."""

    def both(p: Problem) -> Any:
        floats = p.x, p.gate, p.up, p.down
        y, pull = jax.vjp(lambda *a: layer(Problem(*a, p.experts, p.weights)), *floats)
        return y, *pull(y)

    return {"forward": jax.jit(layer), "forward + backward": jax.jit(both)}


def measure(
    shape: tuple[int, int, int],
    experts: tuple[int, int],
    dtype: Any,
    rounds: int,
    only: list[str] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The rows of each group, and by form the figures."""
    p = random_problem(shape, experts, dtype)
    sizes = np.bincount(np.asarray(p.experts).reshape(-1), minlength=experts[0])
    runs = {
        name: (passes(layer), of)
        for name, (layer, of) in forms(shape, p).items()
        if only is None or name in ("dense", "grouped", *only)
    }
    want = [np.asarray(a, np.float32) for a in runs["grouped"][0]["forward + backward"](p)]
    same = ["three products", "ragged_dot", "masked loop"]
    # With a group beyond its capacity tokens are dropped, and the result differs.
    same += ["capacity 2"] if sizes.max() <= 2 * sizes.mean() else []
    for name in set(same) & set(runs):
        for a, b in zip(runs[name][0]["forward + backward"](p), want, strict=True):
            error = float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max())
            if not error < (1e-4 if dtype == jnp.float32 else 3e-2):
                raise SystemExit(f"wrong result of {name}: relative error {error}")
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for name, (compiled, of) in runs.items():
            for which, fn in compiled.items():
                taken = seconds(fn, of)
                if turn:  # the first warms up
                    times.setdefault((name, which), []).append(taken)
    found: dict[str, dict[str, float]] = {}
    for (name, which), taken in times.items():
        dense = times["dense", which]
        found.setdefault(name, {}).update(
            {
                f"{which}, ms": round(1e3 * min(taken), 2),
                f"{which}, ratio": round(min(taken) / min(dense), 3),
                f"{which}, median ratio": round(
                    statistics.median(a / b for a, b in zip(taken, dense, strict=True)), 3
                ),
            }
        )
    return {"group sizes": sizes.tolist()}, found


def main() -> None:
    """Measure, print the table, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 512, 1376), metavar="TDH")
    parser.add_argument("--experts", type=int, nargs=2, default=(16, 2), metavar="Ek")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--forms", nargs="+", help="only these, beside dense and grouped")
    parser.add_argument("--out")
    options = parser.parse_args()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    shape, experts = tuple(options.shape), tuple(options.experts)
    here_and_now = setting() | {
        "shape": list(shape),
        "experts": list(experts),
        "dtype": options.dtype,
        "rounds": options.rounds,
    }
    print("\n".join(f"{key}: {value}" for key, value in here_and_now.items()), flush=True)
    load = os.getloadavg()[0]
    more, found = measure(
        shape, experts, jnp.dtype(options.dtype), options.rounds, only=options.forms
    )
    # On a busy machine ratios mean little: say how busy it was.
    more["load average, before and after"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    print(more)
    print(
        f"{'':15}   forward                  forward + backward\n{'':15}" + "   ms ratio median" * 2
    )
    for name, row in found.items():
        print(f"{name:15}" + "".join(f"{value:8.2f}" for value in row.values()), flush=True)
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"setting": here_and_now | more, "measured": found}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
