"""SkillNet: a feed-forward module for every skill, of which a task activates the ones it needs.

Who knows the task names its skills, such as ("general", "question answering"); only their modules
run, and the mean of what they say is the output. Attention is shared by all. A skill that is added
later leaves what the others compute as it was.

Shape letters: B texts, T tokens, D width, E skills, k skills of a task.

Reference: Zhang et al., SkillNet-NLU: A sparsely activated model for general-purpose natural
language understanding, 2022, arXiv:2203.03312.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse import moe, nn
from models.transformer import Attention, Config, RMSNorm


class SkillBlock(nnx.Module):
    """x + attention(norm x), then x + mean of the modules of the active skills.

    Attributes:
        skills: Names, in the order of the modules.

    Example:
        >>> config = Config(width=8, heads=2, kv_heads=1, head_width=4, hidden=16)
        >>> block = SkillBlock(config, ("general", "tagging", "pairs"), rngs=nnx.Rngs(0))
        >>> active = block.active([("general", "pairs"), ("tagging",)])
        >>> active.tolist()  # 3 stands for none
        [[0, 2], [1, 3]]
        >>> block(jnp.ones((2, 5, 8)), active).shape
        (2, 5, 8)

    Cost: of k modules a token, whatever the number of skills.

    Deviations: a decoder's block as in `transformer.py`, gated modules; the paper's is an encoder.
    """

    def __init__(self, config: Config, skills: Sequence[str], *, rngs: nnx.Rngs):
        """Random modules, of `config.hidden` hidden units each."""
        if len(set(skills)) != len(skills) or not skills:
            raise ValueError(f"skills must be different names, one at least; got {tuple(skills)}.")
        self.skills = tuple(skills)
        self.attention_norm, self.norm = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = Attention(config, rngs=rngs)
        self.experts = nn.MoE(
            config.width, config.hidden, len(skills), moe.given(), gate=_nothing(), rngs=rngs
        )

    def active(self, tasks: Sequence[Sequence[str]]) -> jax.Array:
        """Skills of each of B texts by name -> int32 [B, k]; E fills up shorter lists.

        Raises:
            ValueError: On a name that is no skill, or a text without any.
        """
        for name in (name for names in tasks for name in names):
            if name not in self.skills:
                near = difflib.get_close_matches(name, self.skills, 1) or self.skills
                raise ValueError(f"{name!r} is no skill here. Near: {near[0]}.")
        if not all(tasks):
            raise ValueError("every text needs a skill; one has none.")
        most = max(map(len, tasks))
        rows = [[self.skills.index(name) for name in names] for names in tasks]
        return jnp.array([row + [len(self.skills)] * (most - len(row)) for row in rows], jnp.int32)

    def __call__(self, x: jax.Array, active: jax.Array) -> jax.Array:
        """[B, T, D], and skills [B, k] from `active` -> [B, T, D]."""
        batch, tokens, _ = x.shape
        x = x + self.attention(self.attention_norm(x), jnp.arange(tokens))[0]
        given = jnp.broadcast_to(active[:, None], (batch, tokens, active.shape[-1]))
        return x + self.experts(self.norm(x), given=given)[0]

    def with_skill(self, name: str, *, like: str | None = None, rngs: nnx.Rngs) -> SkillBlock:
        """The same block with one more skill, random or begun as a copy of another.

        Raises:
            ValueError: If there is such a skill, or none to copy.
        """
        if name in self.skills:
            raise ValueError(f"there is a skill {name!r} already.")
        if like is not None and like not in self.skills:
            raise ValueError(f"like={like!r} is no skill here; there are {', '.join(self.skills)}.")
        config = self.attention.config
        new = SkillBlock(config, (*self.skills, name), rngs=rngs)
        for part in ("attention_norm", "norm", "attention"):
            nnx.update(getattr(new, part), nnx.state(getattr(self, part)))
        for kind in ("gate", "up", "down"):
            old, fresh = getattr(self.experts, kind)[...], getattr(new.experts, kind)[...]
            last = fresh[-1] if like is None else old[self.skills.index(like)]
            getattr(new.experts, kind).set_value(jnp.concatenate([old, last[None]]))
        return new


def _nothing() -> moe.Gate:
    """Logits that nobody asks for: only their shape counts."""

    def logits(weights: Any, x: jax.Array, first: jax.Array, **_: Any) -> jax.Array:
        return jnp.zeros((x.shape[0], first.shape[0]), jnp.float32)

    return moe.Gate(lambda key, features, experts: {}, logits)
