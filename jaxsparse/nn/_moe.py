"""A feed-forward layer of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse.moe._dispatch import apply_experts
from jaxsparse.moe._gates import Gate, linear_gate
from jaxsparse.moe._routing import Router, Routing, Statistics, limited, statistics
from pallas_kernels import grouped_ffn


class RouterState(nnx.Variable):
    """What a router carries from step to step without a gradient, as the bias of `loss_free`."""


class Routed(NamedTuple):
    """What a `MoE` says beside its output.

    Attributes:
        aux: float32 scalar, to be added to the loss.
        statistics: Of this call; see `MoE.next_state`.
        routing: The choices, for experts `[T, k]` of all tokens in a row.
    """

    aux: jax.Array
    statistics: Statistics
    routing: Routing


class MoE(nnx.Module):
    """Gated MLPs as experts, of which a router chooses some for each token; none is dropped.

    Every token goes to the experts chosen for it by one grouped product over tokens sorted by
    expert. Shared experts see every token. The weights of experts are stacked, `[E, in, out]`, so
    that pruning treats each expert by itself.

    Attributes:
        router: `nnx.Dict` of the gate's weights.
        gate: `[E, features, hidden]`, the matrices under the activation.
        up: `[E, features, hidden]`.
        down: `[E, hidden, features]`.
        state: `RouterState`, of the router.

    Example:
        >>> import jax.numpy as jnp, jaxsparse as jsp
        >>> from flax import nnx
        >>> router = jsp.moe.token_choice(2)
        >>> layer = jsp.nn.MoE(16, 32, 4, router, rngs=nnx.Rngs(0))
        >>> y, routed = layer(jnp.ones((2, 3, 16)))
        >>> y.shape, routed.statistics.load.shape
        ((2, 3, 16), (4,))

    Cost: 6 D H FLOPs a chosen expert and token forward, twice that backward; see `apply_experts`.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        experts: int,
        router: Router,
        *,
        gate: Gate | None = None,
        shared: int = 0,
        capacity_factor: float | None = None,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        scale: float = 1.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Random experts.

        Args:
            features: D, size of input and output.
            hidden: H of each expert; fine-grained experts have few.
            experts: E.
            router: Such as `token_choice(2)`.
            gate: Where logits come from; `linear_gate()` if not given.
            shared: Hidden size of the shared experts together, which see every token; 0 for none.
            capacity_factor: If given, an expert takes at most ceil(factor * T k / E) tokens, those
                of largest weight, and what is beyond is dropped.
            activation: A function of entries.
            scale: Times the standard deviation of the last matrices, 1 / sqrt(H).
            param_dtype: Of the parameters.
            rngs: Random streams; `params` is used.

        Raises:
            ValueError: On sizes less than 1.
        """
        if min(features, hidden, experts) < 1 or shared < 0:
            raise ValueError(
                "MoE needs features, hidden and experts >= 1, and shared >= 0; got "
                f"{features}, {hidden}, {experts} and {shared}."
            )

        def normal(*shape: int, std: float = 1.0) -> nnx.Param:
            std *= shape[-2] ** -0.5
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))

        self.chooser = linear_gate() if gate is None else gate
        weights = self.chooser.init(rngs.params(), features, experts)
        self.router = nnx.Dict({name: nnx.Param(value) for name, value in weights.items()})
        self.gate, self.up = (normal(experts, features, hidden) for _ in range(2))
        self.down = normal(experts, hidden, features, std=scale)
        if shared:
            self.shared_gate, self.shared_up = (normal(features, shared) for _ in range(2))
            self.shared_down = normal(shared, features, std=scale)
        self.state = RouterState(router.init(experts))
        self.choose, self.experts = router, experts
        self.shared, self.capacity_factor = shared, capacity_factor
        self.activation = activation

    def route(self, x: jax.Array, **evidence: Any) -> Routing:
        """Which experts see which of the tokens `[T, D]`, for evidence see `Router` and `Gate`."""
        weights = {name: value.get_value() for name, value in self.router.items()}
        logits = self.chooser.logits(weights, x, self.gate.get_value(), **evidence)
        routing = self.choose.route(logits, self.state.get_value(), **evidence)
        if self.capacity_factor is not None:
            t, k = routing.experts.shape
            capacity = -int(-self.capacity_factor * t * k // self.experts)
            routing = limited(routing, self.experts, capacity)
        return routing

    def __call__(self, x: jax.Array, **evidence: Any) -> tuple[jax.Array, Routed]:
        """[..., D] -> [..., D] and what was chosen; evidence has the leading axes of x."""
        tokens = x.reshape(-1, x.shape[-1])
        lead = x.ndim - 1
        evidence = {
            name: value.reshape(tokens.shape[0], *value.shape[lead:])
            if name in ("tokens", "given", "task")
            else value
            for name, value in evidence.items()
        }
        routing = self.route(tokens, **evidence)
        gate, up, down = (w.get_value().astype(x.dtype) for w in (self.gate, self.up, self.down))
        run = partial(_experts, gate, up, down, self.activation)
        y = apply_experts(tokens, routing, self.experts, run)
        if self.shared:
            gate, up, down = (
                w.get_value().astype(x.dtype)
                for w in (self.shared_gate, self.shared_up, self.shared_down)
            )
            y = y + (self.activation(tokens @ gate) * (tokens @ up)) @ down
        routed = Routed(routing.aux, statistics(routing, self.experts), routing)
        return y.reshape(x.shape), routed

    def next_state(self, seen: Statistics) -> Any:
        """The router's state after a step with these statistics; the caller stores it.

        Layers are called inside scan and grad, so nothing is stored behind their back:
        `layer.state.set_value(layer.next_state(routed.statistics))` after the step.
        """
        return self.choose.update(self.state.get_value(), seen)


def _experts(gate, up, down, activation, rows, sizes):
    return grouped_ffn(rows, gate, up, down, sizes, activation=activation)
