"""One way to train the model: an optimizer, with or without masks, and its jitted functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsparse as jsp
from experiments.options import ALGORITHMS, STORED, Options, distribution, model_config, optimizer
from models.transformer import Transformer
from pallas_kernels import Topology

Tree = Any


class Arm(NamedTuple):
    """A way to train; `graph` and params make the model (`nnx.merge(graph, params)`).

    Attributes:
        name: `rigl`, `dense`, ...
        graph: static half of the model.
        tx: the optimizer.
        init: () -> (params, opt_state).
        step: (params, opt_state, tokens [B, T + 1]) -> (params, opt_state, nats a byte); donates
            both trees.
        nats: (params, opt_state, tokens, weights) -> (weighted sum of nats, sum of weights).
        view: (params, opt_state) -> the params that the model sees.
        masks: opt_state -> mask tree (of blocks, where those are stored), or None without masks.
    """

    name: str
    graph: Any
    tx: optax.GradientTransformationExtraArgs
    init: Callable[[], tuple[Tree, Tree]]
    step: Callable[[Tree, Tree, jax.Array], tuple[Tree, Tree, jax.Array]]
    nats: Callable[[Tree, Tree, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    view: Callable[[Tree, Tree], Tree]
    masks: Callable[[Tree], Tree] | None


def make_arm(options: Options, algorithm: str) -> Arm:
    """Build the arm of an algorithm; `dense` has no masks. Nothing is allocated or compiled yet.

    Raises:
        ValueError: the plan does not fit the model, for example NM(3, 7) on a width of 256.
    """
    config = model_config(options)
    inner = optax.with_extra_args_support(optimizer(options, algorithm))
    make = partial(Transformer, config)
    graph = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]
    stored = algorithm in STORED

    def begin():
        params = nnx.split(make(rngs=nnx.Rngs(options.training.seed)))[1]
        return stored_blocks(params, options, algorithm) if stored else (params, None)

    def wrap(blocks):
        if algorithm == "dense":
            return None, inner
        made = STORED[algorithm](options, blocks) if stored else ALGORITHMS[algorithm](options)
        return made, jsp.sparsify(inner, made, packed=not stored)

    updater, tx = wrap(jax.eval_shape(begin)[1])

    def view(params, state):
        return params if updater is None else updater.view(params, state.updater)

    @jax.jit
    def init():
        params, blocks = begin()
        state = wrap(blocks)[1].init(params)
        if updater is None or stored or getattr(state.updater, "dense_weights", False):
            return params, state
        masks = jsp.masks(state)  # what is not kept is zero from the first forward pass on
        return jax.tree.map(fill_fan_in, jsp.apply_masks(params, masks), masks), state

    def losses(params, state, tokens):
        logits = nnx.merge(graph, view(params, state))(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        value, gradient = jax.value_and_grad(lambda p: losses(p, state, tokens).mean())(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def nats(params, state, tokens, weights):
        return (losses(params, state, tokens) * weights).sum(), weights.sum()

    masks = None if updater is None else jax.jit(block_maps if stored else jsp.masks)
    jax.eval_shape(init)  # plans that do not fit are found here
    return Arm(algorithm, graph, tx, init, step, nats, view, masks)


def stored_blocks(params: Tree, options: Options, algorithm: str) -> tuple[Tree, Tree]:
    """Random blocks of fresh weights from `jsp.blockify`, scaled as `fill_fan_in` does."""
    key = jax.random.key(options.training.seed + 1)
    values, blocks = jsp.blockify(params, distribution(options.sparse), jsp.random, key=key)

    def scale(leaf, topology):
        if not isinstance(topology, Topology):
            return leaf
        return leaf * (topology.grid[0] / topology.fan_in) ** 0.5

    values = jax.tree.map(scale, values, blocks)
    return jsp.add_probes(values, blocks) if algorithm == "block_rigl" else values, blocks


def block_maps(state: Tree) -> Tree:
    """Masks of blocks `[L, K/bk, N/bn]` in the state of an optimizer of stored blocks."""
    return jax.tree.map(
        lambda leaf: leaf.block_map if isinstance(leaf, Topology) else leaf,
        state.updater.blocks,
        is_leaf=lambda leaf: isinstance(leaf, Topology),
    )


def fill_fan_in(weight: jax.Array, mask: jax.Array) -> jax.Array:
    """Scale fresh sparse weights [..., in, out] so that each output varies as in the dense layer.

    Dense weights have variance 1 / in; with k inputs kept that must be 1 / k (Evci et al., Gradient
    flow in sparse neural networks, 2022, arXiv:2010.03533). Without it a sparse run starts with
    signals that fade from layer to layer.
    """
    if not mask.ndim:
        return weight
    share = jnp.mean(mask, axis=-2, keepdims=True)
    return weight * jax.lax.rsqrt(jnp.maximum(share, 1 / weight.shape[-2]))


def bits_per_byte(arm: Arm, params: Tree, state: Tree, windows: Iterable[Any]) -> float:
    """Mean bits per byte over the windows of `text.windows`."""
    total, count = 0.0, 0.0
    for tokens, weights in windows:
        nats, number = arm.nats(params, state, jnp.asarray(tokens), jnp.asarray(weights))
        total, count = total + float(nats), count + float(number)
    return total / count / float(np.log(2))


@jax.jit
def by_layer(old: Tree, new: Tree) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sparsity of `new` and churn from `old` by path, each [L]; leaves never pruned are left out.

    Churn is the share of kept weights that were not kept before.
    """
    found = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True)
    for (path, mask), before in pairs:
        if mask.ndim:
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            axes = tuple(range(1, mask.ndim))
            kept = mask.mean(axis=axes)
            fresh = (mask & ~before).mean(axis=axes)
            found[name] = (1 - kept, fresh / jnp.maximum(kept, 1e-12))
    return found
