"""SLoRB: the low-rank branch of AST, Huang et al., 2024, arXiv:2407.20584."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def slorb_init(w: jax.Array, mask: jax.Array, k: int = 64) -> jax.Array:
    """Weights of a branch that gives each output what its pruned weights added on average.

    Entry (g, j) is the mean, over the k inputs of group g, of w(i, j) where it is pruned and zero
    where it is kept. With inputs that are alike within a group the branch makes up for pruning.

    Args:
        w: `[..., K, N]`, before pruning.
        mask: bool of that shape, True = kept.
        k: Inputs of a group; divides K.

    Returns:
        `[..., K / k, N]`, to be trained beside w and used by `slorb`.

    Raises:
        ValueError: If k does not divide K.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> w, mask = jnp.array([[3.0], [1.0]]), jnp.array([[True], [False]])
        >>> float(jsp.slorb_init(w, mask, 2)[0, 0])
        0.5

    Cost: parameters: 1 / k of the weight.

    References: Huang et al., Pruning large language models with semi-structural adaptive sparse
    training, 2024, arXiv:2407.20584 (checked against the authors' code; there also a sum instead of
    the mean, and a projection that is trained).
    """
    *lead, rows, columns = w.shape
    if k < 1 or rows % k:
        raise ValueError(f"slorb groups k inputs, a divisor of axis -2; got k={k} and {w.shape}.")
    pruned = jnp.where(mask, jnp.zeros((), w.dtype), w)
    return jnp.mean(pruned.reshape(*lead, rows // k, k, columns), -2)


def slorb(x: jax.Array, branch: jax.Array) -> jax.Array:
    """The branch: inputs summed over their groups, times its weights; add it to `x @ w`.

    Args:
        x: `[..., K]`.
        branch: `[K / k, N]`, from `slorb_init`.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: If the rows of the branch do not divide K.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> jsp.slorb(jnp.array([1.0, 2.0]), jnp.array([[0.5]]))
        Array([1.5], dtype=float32)

    Cost: K adds and K N / k multiply-adds for each row of x.

    References: Huang et al., 2024, arXiv:2407.20584.
    """
    groups = branch.shape[-2]
    if x.shape[-1] % groups:
        raise ValueError(
            f"slorb needs inputs that the rows of its branch divide; got {x.shape} and "
            f"{branch.shape}."
        )
    pooled = jnp.sum(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -1)
    return pooled @ branch
