"""Monet: n^2 experts made of 2n halves, chosen by product keys.

Expert (i, j) is put together from piece i of one set and piece j of another, so that the number of
experts grows with the square of the parameters. Each head scores the n pieces of either set, and
the weight of expert (i, j) is w_ij = sum_h p_hi q_hj, with p and q probabilities over the k best
pieces of each set. No expert is ever made: every piece runs once, and weights are summed first.

* horizontal: E_ij(x) = V_j f(U_i x + b_i) + c_j, the first layer of i and the second of j;
* vertical: hidden units and outputs are cut in two, the upper halves of i and the lower of j.

Shape letters: T tokens, D width, n pieces of a set, m hidden units of an expert, h heads.

Reference: Park et al., Monet: Mixture of monosemantic experts for transformers, 2024,
arXiv:2412.04139.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a Monet layer.

    Attributes:
        width: D, even for the vertical form.
        hidden: m, even for the vertical form.
        pieces: n; the layer has n^2 experts.
        heads: h.
        chosen: k, pieces of a set that a head uses; k^2 experts a head.
        balance: Factor of the losses that spread tokens over pieces and make choices clear.
    """

    width: int = 64
    hidden: int = 8
    pieces: int = 32
    heads: int = 2
    chosen: int = 4
    balance: float = 1e-3

    def __post_init__(self) -> None:
        """Raise ValueError on shapes that cannot be."""
        if not 1 <= self.chosen <= self.pieces:
            raise ValueError(f"needs 1 <= chosen <= pieces; got {self.chosen} and {self.pieces}.")


class Mix(NamedTuple):
    """Weights of pieces: two `[T, h, n]`, and what belongs in the loss."""

    first: jax.Array
    second: jax.Array
    aux: jax.Array


class ProductKeys(nnx.Module):
    """The router: two rows of n keys for each head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Random keys."""
        self.config = config
        shape = (2, config.width, config.heads, config.pieces)
        self.keys = nnx.Param(config.width**-0.5 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x: jax.Array) -> Mix:
        """Weights for tokens [T, D].

        Losses: uniformity -mean log of the mean probability of a piece, less its least value log n,
        and ambiguity 1 - the largest probability.
        """
        c = self.config
        scores = jnp.einsum("td,sdhn->sthn", x.astype(jnp.float32), self.keys.get_value())
        least = jax.lax.top_k(scores, c.chosen)[0][..., -1:]
        p = jax.nn.softmax(scores)
        used = jax.nn.softmax(jnp.where(scores >= least, scores, -jnp.inf))
        even = -jnp.log(jnp.maximum(p.mean(1), 1e-9)).mean() - jnp.log(c.pieces)
        unclear = (1 - p.max(-1)).mean()
        return Mix(used[0], used[1], c.balance * (even + unclear))


class Horizontal(nnx.Module):
    """First layer of piece i, second layer of piece j.

    Example:
        >>> layer = Horizontal(Config(width=8, pieces=16), rngs=nnx.Rngs(0))  # 256 experts
        >>> y, aux = layer(jnp.ones((3, 8)))
        >>> y.shape
        (3, 8)

    Cost: 4 n m D FLOPs a token and 2 h n^2 m to mix, whatever the number of chosen experts.

    Deviations: exact top k pieces, where the paper's training takes a threshold from normalized
        scores; ReLU squared as there.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Random pieces."""
        self.config, self.router = config, ProductKeys(config, rngs=rngs)
        n, d, m = config.pieces, config.width, config.hidden
        self.up, self.up_bias = _normal(rngs, n, d, m), nnx.Param(jnp.zeros((n, m)))
        self.down, self.down_bias = _normal(rngs, n, m, d), nnx.Param(jnp.zeros((n, d)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[T, D] -> [T, D] and what belongs in the loss."""
        mix = self.router(x)
        a = _act(jnp.einsum("td,ndm->tnm", x, self.up.get_value()) + self.up_bias.get_value())
        # sum_i w_ij a_i for every j, through the heads: w itself, n^2 numbers, is not made.
        z = jnp.einsum("thn,tnm->thm", mix.first, a)
        z = jnp.einsum("thj,thm->tjm", mix.second, z)
        y = jnp.einsum("tjm,jmd->td", z, self.down.get_value())
        total = jnp.einsum("thi,thj->tj", mix.first, mix.second)
        return y + total @ self.down_bias.get_value(), mix.aux


class Vertical(nnx.Module):
    """Half of the hidden units and outputs of piece i, the other half of piece j.

    E_ij(x) = [V11_i a_i + V12_i a'_j + c_i; V21_j a_i + V22_j a'_j + c'_j] with
    a_i = f(U_i x + b_i), a'_j = f(U'_j x + b'_j).

    Example:
        >>> layer = Vertical(Config(width=8, pieces=16), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8)))[0].shape
        (3, 8)

    Cost: as `Horizontal`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Random pieces; index 0 is the set of i, index 1 that of j."""
        if config.width % 2 or config.hidden % 2:
            raise ValueError(f"width and hidden must be even; got {config.width}, {config.hidden}.")
        self.config, self.router = config, ProductKeys(config, rngs=rngs)
        n, d, m = config.pieces, config.width, config.hidden // 2
        self.up, self.up_bias = _normal(rngs, 2, n, d, m), nnx.Param(jnp.zeros((2, n, m)))
        # [output half, input half, n, m, D / 2]: the pieces are those of the output half.
        self.down = _normal(rngs, 2, 2, n, m, d // 2)
        self.down_bias = nnx.Param(jnp.zeros((2, n, d // 2)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[T, D] -> [T, D] and what belongs in the loss."""
        mix = self.router(x)
        up, down, bias = (w.get_value() for w in (self.up, self.down, self.down_bias))
        a = _act(jnp.einsum("td,sndm->stnm", x, up) + self.up_bias.get_value()[:, None])
        weights = (mix.first, mix.second)
        halves = []
        for own, other in ((0, 1), (1, 0)):
            p, q = weights[own], weights[other]
            total = jnp.einsum("thi,thj->ti", p, q)  # sum over j of w_ij
            # What an own piece sees of the other set: sum over j of w_ij a'_j.
            seen = jnp.einsum("thi,thm->tim", p, jnp.einsum("thj,tjm->thm", q, a[other]))
            y = jnp.einsum("tim,imd->td", total[..., None] * a[own], down[own, own])
            y = y + jnp.einsum("tim,imd->td", seen, down[own, other])
            halves.append(y + total @ bias[own])
        return jnp.concatenate(halves, -1), mix.aux


def _act(x: jax.Array) -> jax.Array:
    return jax.nn.relu(x) ** 2


def _normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(shape[-2] ** -0.5 * jax.random.normal(rngs.params(), shape))
