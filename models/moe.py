"""A decoder language model of experts: fine-grained experts, shared experts, grouped queries.

The transformer of `transformer.py` with the SwiGLU of every block replaced by `jsp.nn.MoE`: many
small experts of which a router takes a few, and shared experts that see every token. No token is
dropped.

Shape letters as in `transformer.py`, and E experts.

References: Dai et al., DeepSeekMoE, 2024, arXiv:2401.06066; Gale et al., MegaBlocks, 2022,
arXiv:2211.15841; Muennighoff et al., OLMoE, 2024, arXiv:2409.02060.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse import moe, nn
from models import transformer
from models.transformer import Cache, Linear, RMSNorm


@dataclasses.dataclass(frozen=True)
class Config(transformer.Config):
    """Shape of a `MoETransformer`; the fields of `transformer.Config`, and these.

    Attributes:
        hidden: Width of one expert, not of all.
        experts: E, experts of a block.
        chosen: Experts a token sees, beside the shared ones; for the default router.
        shared: Width of the shared experts together; 0 for none.
        router: How experts are chosen; `token_choice(chosen)` if not given.
        gate: Where the router's logits come from; `linear_gate()` if not given.
        capacity_factor: See `jsp.nn.MoE`; None drops no token.
    """

    hidden: int = 176
    experts: int = 16
    chosen: int = 3
    shared: int = 176
    router: moe.Router | None = None
    gate: moe.Gate | None = None
    capacity_factor: float | None = None

    @property
    def active(self) -> transformer.Config:
        """The dense model of the same shape and as many FLOPs a token."""
        fields = dataclasses.fields(transformer.Config)
        same: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields}
        same["hidden"] = self.chosen * self.hidden + self.shared
        return transformer.Config(**same)


SIZES: dict[str, Config] = {
    "tiny": Config(
        width=128, layers=2, heads=4, kv_heads=2, head_width=32, hidden=64, experts=8, chosen=2,
        shared=64, context=128, unroll=2,
    ),
    "small": Config(
        width=256, layers=2, heads=4, kv_heads=2, head_width=64, context=128, unroll=2
    ),
    "base": Config(
        width=512, layers=8, heads=8, kv_heads=4, hidden=256, experts=32, chosen=4, shared=384,
        context=512,
    ),
    "1b-7b": Config(
        width=2048, layers=16, heads=16, kv_heads=16, head_width=128, hidden=1024, experts=64,
        chosen=8, shared=0, context=4096, remat=True,
    ),
}  # fmt: skip
"""Named sizes: 0.6M, 5.1M, 112M and 6.7G parameters; the last has the shape of OLMoE-1B-7B."""


class Block(nnx.Module):
    """x + attention(norm x), then x + experts(norm x)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Make one layer; `MoETransformer` stacks L of them."""
        self.attention_norm = RMSNorm(config.width)
        self.attention = config.attention.make(config, rngs=rngs)
        self.moe_norm = RMSNorm(config.width)
        self.moe = nn.MoE(
            config.width,
            config.hidden,
            config.experts,
            config.router or moe.token_choice(config.chosen),
            gate=config.gate,
            shared=config.shared,
            capacity_factor=config.capacity_factor,
            scale=(2 * config.layers) ** -0.5,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None = None, **evidence: Any
    ) -> tuple[jax.Array, Cache | None, nn.Routed]:
        """[B, T, D] -> [B, T, D], the updated cache, and what the router did."""
        y, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + y
        y, routed = self.moe(self.moe_norm(x), **evidence)
        return x + y, cache, routed


class MoETransformer(nnx.Module):
    """The language model; parameters are `embed/embedding`, `layers/...`, `norm`, `head/kernel`.

    Example:
        >>> model = MoETransformer(SIZES["tiny"], rngs=nnx.Rngs(0))
        >>> logits, routed = model(jnp.zeros((1, 8), jnp.int32))
        >>> logits.shape, routed.statistics.load.shape  # layers, experts
        ((1, 8, 256), (2, 8))
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Make the model; under `nnx.eval_shape` this allocates nothing."""
        self.config = config
        self.embed = nnx.Embed(
            config.vocab, config.width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        stack = nnx.vmap(lambda r: Block(config, rngs=r), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=config.layers)(stack)(rngs)
        self.norm = RMSNorm(config.width)
        self.head = Linear(config.width, config.vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array, **evidence: Any) -> tuple[jax.Array, nn.Routed]:
        """Logits float32 [B, T, V] of int32 [B, T], and what every router did, stacked [L, ...].

        `routed.aux.sum()` belongs in the loss. Evidence: `key` for routers that draw, and arrays
        [B, T] `given` or `task`; the tokens are there for those that hash.
        """
        logits, _, routed = self._run(tokens, jnp.arange(tokens.shape[1]), None, evidence)
        return logits, routed

    def apply(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Logits of tokens [B, T] that stand at positions [T], and the cache with them in it."""
        return self._run(tokens, positions, cache, {})[:2]

    def _run(self, tokens, positions, cache, evidence):
        c = self.config
        x = self.embed.embedding.get_value()[tokens].astype(c.dtype)
        graph, stacked = nnx.split(self.layers)
        evidence = {"tokens": tokens, **evidence}
        key = evidence.pop("key", None)
        keys = None if key is None else jax.random.split(key, c.layers)

        def layer(x, inputs):
            weights, cache, key = inputs
            drawn = {} if key is None else {"key": key}
            x, cache, routed = nnx.merge(graph, weights)(x, positions, cache, **evidence, **drawn)
            return x, (cache, routed)

        step = jax.checkpoint(layer) if c.remat else layer
        inputs = (stacked, cache, keys)
        x, (cache, routed) = jax.lax.scan(step, x, inputs, length=c.layers, unroll=c.unroll)
        return self.head(self.norm(x)).astype(jnp.float32), cache, routed

    def empty_cache(self, batch: int, size: int) -> Cache:
        """A cache for `size` tokens."""
        c = self.config
        shape = (c.layers, batch, size, c.kv_heads, c.head_width)
        return Cache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))

    def update_routers(self, seen: moe.Statistics) -> None:
        """Let routers that balance by a state take a step: `seen` is `routed.statistics` [L, ...].

        Once an optimizer step, outside of the gradient, with the mean over devices and batches.
        """
        graph, stacked = nnx.split(self.layers)
        state = jax.vmap(lambda w, s: nnx.merge(graph, w).moe.next_state(s))(stacked, seen)
        self.layers.moe.state.set_value(state)
