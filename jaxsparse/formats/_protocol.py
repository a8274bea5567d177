"""What a layer may ask of a weight that is not a dense array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class SparseWeight(Protocol):
    """A weight for `x @ w`: a frozen dataclass, registered as a pytree.

    Leading axes of its arrays are stacked weights (layers, experts, seeds); they must lead in x
    too. A format sets `__array_ufunc__ = None`, so that a numpy array on the left works.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.formats import CSR, SparseWeight
        >>> isinstance(CSR.from_dense(jnp.eye(2)), SparseWeight)
        True
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N), inputs and outputs of one slice."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the stored values."""
        ...

    def todense(self) -> jax.Array:
        """The weight with its zeros, `[..., K, N]`."""
        ...

    def __rmatmul__(self, x: Any) -> jax.Array:
        """`x @ w`: `[..., K]` to `[..., N]`."""
        ...


def multiply_slices(
    multiply: Callable[[Any, jax.Array], jax.Array], w: Any, x: Any, stack: tuple[int, ...]
) -> jax.Array:
    """`multiply(w, x)` for each slice of a stack of weights.

    Args:
        multiply: A slice of the weight and `[..., K]` to `[..., N]`.
        w: The weight; `stack` are the leading axes of its arrays.
        x: `[*stack, ..., K]`.
        stack: Stacked axes of w.

    Raises:
        ValueError: If x does not fit.
    """
    x = jnp.asarray(x)
    fits = x.ndim > len(stack) and x.shape[: len(stack)] == stack and x.shape[-1] == w.shape[0]
    if not fits:
        need = ", ".join(map(str, [*stack, "...", w.shape[0]]))
        what = f"a stack {stack} of weights" if stack else "a weight"
        raise ValueError(
            f"x @ w with {what} {w.shape} needs x of shape ({need}); got {x.shape}."
            + (" Scan or index the stack, or put its axes first." if stack else "")
        )
    for _ in stack:
        multiply = jax.vmap(multiply)
    return multiply(w, x)


def whole_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """A mask in the shape of its weight.

    Raises:
        TypeError: If it is not bool.
        ValueError: If it does not broadcast to the weight.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, True = kept; got {mask.dtype}. Write mask != 0.")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"mask must broadcast to the weight {shape}; got {mask.shape}. Make it from this "
            "weight."
        ) from None
