"""MoE-X: a layer of ReLU experts that is one wide, very sparse MLP, made to be read.

Expert e computes relu(x W_e) V_e. A token goes to the k experts whose hidden units would be the
sparsest for it; that is foretold from mean and variance of W_e, without running them. Side by side
the experts are one MLP of E H hidden units, of which a token uses few: those are what one reads.

Shape letters: T tokens, D width, E experts, H hidden units of an expert, k experts a token.

Reference: Yang et al., Mixture of experts made intrinsically interpretable, 2025, arXiv:2503.07639.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse import moe
from pallas_kernels import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a `MoEX`.

    Attributes:
        width: D.
        hidden: H.
        experts: E.
        router: What chooses by the logits, such as `token_choice(2)`.
        gate: Where logits come from.
    """

    width: int = 64
    hidden: int = 128
    experts: int = 8
    router: moe.Router = moe.token_choice(2)
    gate: moe.Gate = moe.sparsity_gate()


class Read(NamedTuple):
    """What a token activates.

    Attributes:
        hidden: `[T, E H]`, of the wide MLP: zero outside of the chosen experts.
        density: share of hidden units of the chosen experts that are not zero, a number.
    """

    hidden: jax.Array
    density: jax.Array


class MoEX(nnx.Module):
    """The layer.

    Example:
        >>> layer = MoEX(Config(width=8, hidden=16, experts=4), rngs=nnx.Rngs(0))
        >>> y, routing = layer(jnp.ones((3, 8)))
        >>> y.shape, layer.read(jnp.ones((3, 8))).hidden.shape
        ((3, 8), (3, 64))

    Deviations: the layer alone; ReLU experts have no biases.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Random experts."""
        self.config = config
        d, h, e = config.width, config.hidden, config.experts
        self.encode = nnx.Param(d**-0.5 * jax.random.normal(rngs.params(), (e, d, h)))
        self.decode = nnx.Param(h**-0.5 * jax.random.normal(rngs.params(), (e, h, d)))
        weights = config.gate.init(rngs.params(), d, e)
        self.router = nnx.Dict({name: nnx.Param(value) for name, value in weights.items()})

    def route(self, x: jax.Array, **evidence: jax.Array) -> moe.Routing:
        """Experts of tokens [T, D]."""
        weights = {name: value.get_value() for name, value in self.router.items()}
        logits = self.config.gate.logits(weights, x, self.encode.get_value(), **evidence)
        return self.config.router.route(logits, (), **evidence)

    def __call__(self, x: jax.Array, **evidence: jax.Array) -> tuple[jax.Array, moe.Routing]:
        """[T, D] -> [T, D], and the choices, whose `aux` belongs in the loss."""
        encode, decode = (w.get_value().astype(x.dtype) for w in (self.encode, self.decode))

        def run(rows, sizes):
            return grouped_matmul(jax.nn.relu(grouped_matmul(rows, encode, sizes)), decode, sizes)

        routing = self.route(x, **evidence)
        return moe.apply_experts(x, routing, self.config.experts, run), routing

    def read(self, x: jax.Array, **evidence: jax.Array) -> Read:
        """Hidden units of the wide MLP whose second matrix is `decode` as [E H, D].

        For a look at few tokens: it runs every expert.
        """
        e, h = self.config.experts, self.config.hidden
        routing = self.route(x, **evidence)
        chosen = jax.nn.one_hot(routing.experts, e) * routing.weights[..., None]  # [T, k, E]
        units = jax.nn.relu(jnp.einsum("td,edh->teh", x, self.encode.get_value()))
        units = units * chosen.sum(1)[..., None]
        used = jnp.sum(routing.experts < e) * h
        density = jnp.sum(units > 0) / jnp.maximum(used, 1)
        return Read(units.reshape(x.shape[0], e * h), density)
