"""Where the logits of a router come from.

References: Xu et al., Towards a unified view of sparse feed-forward network in pretraining large
language model, 2023, arXiv:2305.13999 (mean key); Gupta et al., Sparsely activated mixture-of-
experts are robust multi-task learners, 2022, arXiv:2204.07689 (task); Yang et al., Mixture of
experts made intrinsically interpretable, 2025, arXiv:2503.07639 (sparsity).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm


class Gate(NamedTuple):
    """Logits [T, E] of tokens, from weights of its own or from those of the experts.

    Attributes:
        init: `(key, features, experts) -> weights`, a dict of arrays, empty for none.
        logits: `(weights, x [T, D], up [E, D, H], **evidence) -> float32 [T, E]`; evidence `task`
            int `[T]` for `task_gate`.

    Example:
        >>> import jaxsparse as jsp
        >>> first = jsp.moe.Gate(lambda key, features, experts: {}, lambda w, x, up, **_: x[:, :2])
        >>> first.logits({}, jnp.ones((5, 4)), jnp.zeros((2, 4, 8))).shape
        (5, 2)
    """

    init: Callable[[jax.Array, int, int], dict[str, jax.Array]]
    logits: Callable[..., jax.Array]


def linear_gate() -> Gate:
    """The learned gate of most models: logits = x W with W [D, E].

    Example:
        >>> import jaxsparse as jsp
        >>> jsp.moe.linear_gate().init(jax.random.key(0), 8, 4)["kernel"].shape
        (8, 4)
    """

    def logits(weights: dict[str, jax.Array], x: jax.Array, up: jax.Array, **_: Any) -> jax.Array:
        return _product(x, weights["kernel"])

    return Gate(_kernel, logits)


def mean_key_gate() -> Gate:
    """Logits x . k_e, where k_e is the mean of the columns of the first matrix of expert e.

    Nothing to learn: experts that answer a token strongly are chosen.

    Example:
        >>> import jaxsparse as jsp
        >>> keys = jnp.array([[[1.0, 3.0]], [[0.0, -2.0]]])  # E, D, H = 2, 1, 2
        >>> jsp.moe.mean_key_gate().logits({}, jnp.ones((1, 1)), keys).tolist()
        [[2.0, -1.0]]

    Cost: one pass over the first matrices a step.
    """

    def logits(weights: dict[str, jax.Array], x: jax.Array, up: jax.Array, **_: Any) -> jax.Array:
        return _product(x, up.mean(-1).T)

    return Gate(lambda key, features, experts: {}, logits)


def task_gate(tasks: int) -> Gate:
    """Logits x W + V[task]: the token and, by evidence `task` int [T], its task.

    Args:
        tasks: How many there are. A learned embedding of the task times a matrix is one row of V.

    Example:
        >>> import jaxsparse as jsp
        >>> gate = jsp.moe.task_gate(3)
        >>> weights = gate.init(jax.random.key(0), 8, 4)
        >>> x, up = jnp.zeros((2, 8)), jnp.zeros((4, 8, 16))
        >>> gate.logits(weights, x, up, task=jnp.array([0, 2])).shape
        (2, 4)
    """

    def init(key: jax.Array, features: int, experts: int) -> dict[str, jax.Array]:
        kernel, task = jax.random.split(key)
        return _kernel(kernel, features, experts) | {
            "task": 0.1 * jax.random.normal(task, (tasks, experts))
        }

    def logits(
        weights: dict[str, jax.Array],
        x: jax.Array,
        up: jax.Array,
        *,
        task: jax.Array | None = None,
        **_: Any,
    ) -> jax.Array:
        if task is None or task.shape != x.shape[:1]:
            got = None if task is None else task.shape
            raise ValueError(f"task_gate needs task= of shape {x.shape[:1]}; got {got}.")
        return _product(x, weights["kernel"]) + weights["task"].astype(jnp.float32)[task]

    return Gate(init, logits)


def sparsity_gate(sharpness: float = 10.0) -> Gate:
    """Prefers experts whose ReLU would be sparsest, without running them (MoE-X).

    Over the hidden units of expert e, z = x . w_h is taken for a Gaussian with mean x . mean(w) and
    variance sum_d x_d^2 var(w_d); logits_e = -sharpness * P(z > 0) = -sharpness * Phi(mu / sigma).

    Args:
        sharpness: Of the softmax over experts.

    Example:
        >>> import jaxsparse as jsp
        >>> keys = jnp.array([[[1.0, 3.0]], [[-1.0, -2.0]]])  # E, D, H = 2, 1, 2
        >>> logits = jsp.moe.sparsity_gate().logits({}, jnp.ones((1, 1)), keys)
        >>> bool(logits[0, 1] > logits[0, 0])
        True

    Cost: two products [T, D] x [D, E], one pass over the first matrices.

    Deviations: columns are taken as independent, as in the paper; its factor is not published.
    """

    def logits(weights: dict[str, jax.Array], x: jax.Array, up: jax.Array, **_: Any) -> jax.Array:
        up = up.astype(jnp.float32)
        mean = _product(x, up.mean(-1).T)
        variance = _product(x.astype(jnp.float32) ** 2, up.var(-1).T)
        return -sharpness * norm.cdf(mean * jax.lax.rsqrt(variance + 1e-12))

    return Gate(lambda key, features, experts: {}, logits)


def _kernel(key: jax.Array, features: int, experts: int) -> dict[str, jax.Array]:
    return {"kernel": features**-0.5 * jax.random.normal(key, (features, experts))}


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """In float32, as routers need: a logit rounded to bfloat16 changes the choice."""
    return jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32))
