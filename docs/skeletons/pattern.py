"""Skeleton of a pattern: a frozen dataclass with `axes`, `gather` and `scatter`.

Patterns of the library stand in `jaxsparse/patterns.py`; your own can stand anywhere.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Heads:
    """Attention heads: `width` neighbouring outputs live or die together.

    Attributes:
        width: Outputs of a head; divides the outputs.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.make_mask(Heads(2), jnp.array([[3.0, 1.0, 2.0, 1.0]]), 0.5)
        Array([[ True,  True, False, False]], dtype=bool)
    """

    width: int

    @property
    def axes(self) -> tuple[int, ...]:
        """Units compete along the last axis of what `gather` returns."""
        return (-1,)

    def gather(self, scores: jax.Array) -> jax.Array:
        """[..., K, N] -> [..., N / width]; leading axes stay as they are."""
        *lead, k, n = scores.shape
        if n % self.width:
            raise ValueError(
                f"{self} needs axis -1 to be a multiple of {self.width}; got {scores.shape}. "
                "Choose another width, or exclude it with where=."
            )
        heads = scores.reshape(*lead, k, n // self.width, self.width)
        return jnp.sum(heads.astype(jnp.promote_types(scores.dtype, jnp.float32)), (-3, -1))

    def scatter(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """[..., N / width] -> a mask of `shape`."""
        return jnp.broadcast_to(jnp.repeat(keep, self.width, -1)[..., None, :], shape)
