"""Operands for the cases of `grouped_matmul`, and the answers by numpy."""

import jax
import jax.numpy as jnp
import numpy as np


def operands(case, seed=0):
    """Random x [T, K], w [E, K, N], dy [T, N] and the sizes; NaN in rows past their sum."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), case.dtype)  # noqa: E731
    x, w, dy = (
        normal(case.t, case.k),
        normal(len(case.sizes), case.k, case.n),
        normal(case.t, case.n),
    )
    past = sum(case.sizes)
    return x.at[past:].set(jnp.nan), w, dy.at[past:].set(jnp.nan), jnp.array(case.sizes, jnp.int32)


def oracle(x, w, dy, sizes):
    """y, dx, dw by one numpy product a group, in float32."""
    x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    begin = 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(begin, begin + size)
        y[rows], dx[rows] = x[rows] @ w[group], dy[rows] @ w[group].T
        dw[group] = x[rows].T @ dy[rows]
        begin += size
    return y, dx, dw


def ffn_operands(case, seed=0):
    """Random x [T, K], gate, up [E, K, N], down [E, N, K], dy [T, K] and the sizes, as above."""
    x, gate, _, sizes = operands(case, seed)
    _, up, _, _ = operands(case, seed + 100)
    dy, down, _, _ = operands(case, seed + 200)
    scale = jnp.asarray(case.k**-0.5, case.dtype)
    return x, gate * scale, up * scale, down.swapaxes(1, 2), dy, sizes


def ffn_oracle(x, gate, up, down, dy, sizes):
    """y, dx, dgate, dup, ddown by products of one group each, in float32."""
    x, gate, up, down, dy = (jnp.asarray(a, jnp.float32) for a in (x, gate, up, down, dy))
    y, dx = jnp.zeros_like(x), jnp.zeros_like(x)
    slopes, begin = [[], [], []], 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(begin, begin + size)
        begin += size
        layer = lambda x, g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d  # noqa: E731
        found, pull = jax.vjp(layer, x[rows], gate[group], up[group], down[group])
        slope, *others = pull(dy[rows])
        y, dx = y.at[rows].set(found), dx.at[rows].set(slope)
        for list_, one in zip(slopes, others, strict=True):
            list_.append(one)
    return y, dx, *map(jnp.stack, slopes)
