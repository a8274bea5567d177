"""PATCH: Hourri et al., Learnable tile-level hybrid sparsity for LLMs, 2025, arXiv:2509.23410.

Each tile of a frozen weight is dense or n:m, by a logit that is trained. The n:m pattern in sparse
tiles is given, or chosen by trained logits over all patterns of a group, as in MaskLLM (Fang et
al., 2024, arXiv:2409.17481).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.patterns import NM, Block, TransposableNM


class TileLogits(NamedTuple):
    """What `tile_mask` is made of, and what is trained.

    Attributes:
        tiles: `[..., K / bk, N / bn]`, how much each tile wants to be dense.
        choices: `[..., K / m, N, patterns]` (for axis -1 `[..., K, N / m, patterns]`), how much
            each group wants each pattern; None where the patterns are given.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.TileLogits(jnp.zeros((2, 2))).choices is None
        True
    """

    tiles: jax.Array
    choices: jax.Array | None = None


@functools.cache
def nm_patterns(n: int, m: int) -> np.ndarray:
    """The C(m, n) masks of a group, bool `[patterns, m]`, those with early entries first."""
    return np.stack([np.isin(range(m), kept) for kept in itertools.combinations(range(m), n)])


def tile_logits(
    pattern: NM,
    tile: Block,
    mask: jax.Array,
    *,
    key: jax.Array,
    learn_patterns: bool = False,
    deviation: float = 0.014,
    prior: float = 3.0,
) -> TileLogits:
    """First logits: noise, and a leaning to the patterns that a one-shot method found.

    Args:
        pattern: `NM(n, m, axis)`, e.g. `NM(2, 4)`.
        tile: Shape of the tiles, e.g. `Block((128, 128))`; along `axis` a multiple of m.
        mask: bool `[..., K, N]`, n:m masks, e.g. from `prune`.
        key: Random key.
        learn_patterns: Whether the patterns are trained too; else they stay those of `mask`.
        deviation: Standard deviation of the noise.
        prior: Strength of the leaning, in deviations: a pattern that shares s entries with the mask
            gets (s - n / 2) * prior * deviation.

    Returns:
        `TileLogits`, float32.

    Raises:
        ValueError: If tile, pattern and mask do not fit, or a group has more than 1000 patterns.

    Example:
        >>> import jax, jax.numpy as jnp, jaxsparse as jsp
        >>> mask = jsp.make_mask(jsp.NM(2, 4), jnp.arange(32.0).reshape(8, 4), 0.5)
        >>> tiles = jsp.Block((4, 4))
        >>> logits = jsp.tile_logits(jsp.NM(2, 4), tiles, mask, key=jax.random.key(0))
        >>> logits.tiles.shape
        (2, 1)

    Cost: with `learn_patterns` C(m, n) / m floats a weight, 1.5 for 2:4.

    Deviations: noise, leaning, temperature, scale and penalty were checked against the authors'
    code. A leaning of tiles by a saliency, which is there too, is left to the caller: add it to
    `tiles`. So is the reward for the norm of the weights that stay, a line of the loss.

    References: Hourri et al., 2025, arXiv:2509.23410; Fang et al., 2024, arXiv:2409.17481.
    """
    _check(pattern, tile)
    tiles_key, choices_key = jax.random.split(key)
    shape = jax.eval_shape(tile.gather, jax.ShapeDtypeStruct(mask.shape, jnp.float32)).shape
    tiles = deviation * jax.random.normal(tiles_key, shape)
    groups = _last(pattern, pattern.gather(mask))
    if not learn_patterns:
        return TileLogits(tiles)
    if math.comb(pattern.m, pattern.n) > 1000:
        raise ValueError(
            f"a group of {pattern} has {math.comb(pattern.m, pattern.n)} patterns, too many to "
            "learn a logit for each; 1000 at most. Leave learn_patterns out."
        )
    table = nm_patterns(pattern.n, pattern.m).astype(np.float32)
    shared = jnp.matmul(groups.astype(jnp.float32), table.T)
    noise = deviation * jax.random.normal(choices_key, shared.shape)
    return TileLogits(tiles, noise + (shared - pattern.n / 2) * prior * deviation)


def tile_mask(
    logits: TileLogits,
    pattern: NM,
    tile: Block,
    mask: jax.Array,
    *,
    key: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    scale: jax.Array | float = 1.0,
    hard: bool = False,
) -> jax.Array:
    """A mask that can be differentiated by its logits: t + (1 - t) * s.

    t, of a tile, is Gumbel-softmax of (scale * logit, 0), and s is `mask` or the sum of the
    patterns of a group weighted by Gumbel-softmax of scale * choices. Train the logits with
    `loss(w * tile_mask(...)) + strength * abs(tile_mask(...).mean() - density)`, the temperature
    falling (4 to 0.05 in the paper's code) and the scale rising.

    Args:
        logits: From `tile_logits`.
        pattern: `NM(n, m, axis)`.
        tile: Shape of the tiles.
        mask: bool `[..., K, N]`; used where the patterns are not learned.
        key: Random key, a new one at every step. None is the final mask: what is most likely.
        temperature: Of the softmax, above 0; low is nearly 0 or 1.
        scale: Factor of the logits.
        hard: Whether the mask is exactly 0 or 1, with the gradient of the soft one.

    Returns:
        float32 of the shape of `mask`, 0 to 1.

    Raises:
        ValueError: If tile, pattern and mask do not fit, or the temperature is not above 0.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> half = jnp.array([[True, True, False, False] * 2])
        >>> logits = jsp.TileLogits(jnp.array([[1.0, -1.0]]))
        >>> jsp.tile_mask(logits, jsp.NM(2, 4, axis=-1), jsp.Block((1, 4)), half)
        Array([[1., 1., 1., 1., 1., 1., 0., 0.]], dtype=float32)

    Cost: random numbers for each logit, a product of the groups with the patterns.

    References: Hourri et al., 2025, arXiv:2509.23410.
    """
    _check(pattern, tile)
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature of a softmax must be > 0; got {temperature}.")
    keys = (None, None) if key is None else jax.random.split(key)

    def softmax(x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = x * scale
        if key is not None:
            x = (x + jax.random.gumbel(key, x.shape, x.dtype)) / temperature
        soft = jax.nn.softmax(x, -1)
        if key is not None and not hard:
            return soft
        best = jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1], dtype=x.dtype)
        return best + (soft - jax.lax.stop_gradient(soft))  # in this order exactly 0 or 1

    pairs = jnp.stack([logits.tiles, jnp.zeros_like(logits.tiles)], -1)
    t = tile.scatter(softmax(pairs, keys[0])[..., 0], mask.shape)
    s = mask.astype(t.dtype)
    if logits.choices is not None:
        table = nm_patterns(pattern.n, pattern.m).astype(np.float32)
        groups = jnp.matmul(softmax(logits.choices, keys[1]), table)
        s = jnp.moveaxis(groups, -1, pattern.axis).reshape(mask.shape)
    return t + (1 - t) * s


def _last(pattern: NM, gathered: jax.Array) -> jax.Array:
    """The members of a group along the last axis."""
    return jnp.moveaxis(gathered, pattern.axis, -1)


def _check(pattern: NM, tile: Block) -> None:
    if isinstance(pattern, TransposableNM) or tile.shape[pattern.axis] % pattern.m:
        raise ValueError(
            f"tiles hold whole groups of an NM pattern: axis {pattern.axis} of the tile must be a "
            f"multiple of {pattern.m}; got {pattern} and {tile}."
        )
