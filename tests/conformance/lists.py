"""What the conformance tests multiply. Whoever adds a part adds one line here, and no test."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen
import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

import jaxsparse as jsp
from jaxsparse import attention

SHAPES = {"kernel": (8, 16), "bias": (16,), "stack": (2, 8, 8)}  # matrix, dense, scanned layers


class Updater(NamedTuple):
    """How to build an updater, and what is known of its masks."""

    build: Callable[[Any, jax.Array, Any], jsp.MaskUpdater]  # distribution, key, params
    moves: bool | None = False  # whether its masks must change; None: may
    distribution: Callable[[jsp.Pattern], Any] = lambda pattern: jsp.uniform(0.5, pattern)
    exact: bool = True  # whether the counts of each leaf follow from shapes
    drawn: bool = True  # whether the first masks are computed from the weights
    sums: bool = False  # whether the view holds a sum over weights, which devices round in parts


def _fixed(distribution, key, params):
    return jsp.fixed(jsp.prune(params, distribution, jsp.random, key=key)[1])


UPDATERS = {
    "static": Updater(lambda d, key, p: jsp.static(d, key=key)),
    "fixed": Updater(_fixed, drawn=False),
    "gradual": Updater(
        lambda d, key, p: jsp.gradual(d, schedule=jsp.cubic(0, 5), when=jsp.every(2)),
        True,
        drawn=False,
    ),
    "gradual_lamp": Updater(
        lambda d, key, p: jsp.gradual(d, schedule=jsp.linear(1, 5), when=jsp.once(2)),
        True,
        lambda pattern: jsp.lamp(0.5, pattern),
        exact=False,
        drawn=False,
    ),
    "blast": Updater(
        lambda d, key, p: jsp.blast(d, schedule=jsp.cubic(0, 5), when=jsp.every(2)),
        True,
        drawn=False,
    ),
    "set": Updater(
        lambda d, key, p: jsp.set_(d, key=key, when=jsp.every(2), drop_fraction=0.6), True
    ),
    "rigl": Updater(
        lambda d, key, p: jsp.rigl(
            d,
            key=key,
            when=jsp.every(1, stop=5),
            drop_fraction=optax.cosine_decay_schedule(0.6, 5),
        ),
        True,
        lambda pattern: jsp.erk(0.5, pattern),
    ),
    "srigl": Updater(
        lambda d, key, p: jsp.srigl(d, key=key, when=jsp.every(2), least_salient=0.5),
        True,
        lambda pattern: jsp.uniform(0.5, jsp.FanIn()),
        exact=False,
    ),
    "ste": Updater(lambda d, key, p: jsp.ste(d), None),
    "ste_global": Updater(
        lambda d, key, p: jsp.ste(d), None, lambda pattern: jsp.global_(0.5, pattern), exact=False
    ),
    "sr_ste": Updater(lambda d, key, p: jsp.sr_ste(d, decay=0.1), None),
    "s_ste": Updater(
        lambda d, key, p: jsp.s_ste(d),
        None,
        lambda pattern: jsp.uniform(0.5, pattern if type(pattern) is jsp.NM else jsp.NM(2, 4)),
        sums=True,  # its scale
    ),
    "mask_decay": Updater(
        lambda d, key, p: jsp.flip_meter(
            jsp.dense_when(
                jsp.mask_decay(d, fade=optax.linear_schedule(1, 0, 4), when=jsp.every(2)),
                lambda step: step == 3,
            )
        ),
        None,
    ),
    "cast": Updater(lambda d, key, p: jsp.cast(d, decay=0.1, when=jsp.every(2)), None),
}


class StoredUpdater(NamedTuple):
    """How to build an updater of stored blocks, for parameters of the plan `STORED_PLAN`."""

    build: Callable[[Any, jax.Array], jsp.MaskUpdater]  # blocks, key
    probed: bool = False  # whether it trains `add_probes(values, blocks)`
    moves: bool = True
    final: int = 2  # blocks of each column in the end, of 4; 2 are stored at first


STORED_PLAN = jsp.uniform(0.5, jsp.Block((4, 4)), where="stack")


def _rigl(probe):
    def build(blocks, key):
        return jsp.block_rigl(blocks, key=key, when=jsp.every(2, start=1), probe=probe)

    return StoredUpdater(build, probed=True)


STORED_UPDATERS = {
    "block_static": StoredUpdater(lambda blocks, key: jsp.block_static(blocks), moves=False),
    "block_set": StoredUpdater(lambda b, key: jsp.block_set(b, key=key, when=jsp.every(2))),
    "block_rigl": _rigl(jsp.sketch_probe()),
    "block_rigl_exact": _rigl(jsp.exact_probe()),
    "block_rigl_candidates": _rigl(jsp.candidate_probe(1)),
    "block_gradual": StoredUpdater(
        lambda blocks, key: jsp.block_gradual(
            blocks,
            jsp.uniform(0.75, jsp.Block((4, 4)), where="stack"),
            key=key,
            schedule=jsp.linear(0, 3),
            when=jsp.every(1),
            drop_fraction=0.5,
        ),
        probed=True,
        final=1,
    ),
}

FORMATS = {
    "block_sparse": lambda w: jsp.BlockSparse.from_dense(w, (4, 2)),
    "nm_packed": lambda w: jsp.NMPacked.from_dense(w, 2, 4),
    "csr": lambda w: jsp.CSR.from_dense(w),
    "condensed": lambda w: jsp.Condensed.from_dense(w),
}

PATTERNS = {
    "unstructured": jsp.Unstructured(),
    "nm24": jsp.NM(2, 4),
    "nm14_out": jsp.NM(1, 4, axis=-1),
    "transposable24": jsp.TransposableNM(2, 4),
    "block": jsp.Block((2, 4)),
    "channel_out": jsp.Channel(-1),
    "channel_in": jsp.Channel(-2),
    "fan_in": jsp.FanIn(),
}

SCORES = {
    "magnitude": jsp.magnitude,
    "gradient": jsp.gradient,
    "saliency": jsp.saliency,
    "movement": jsp.movement,
    "snip": jsp.snip,
    "random": jsp.random,
    "fisher": jsp.fisher,
}


class Optimizer(NamedTuple):
    """An Optax optimizer, and what stands around `sparsify`."""

    inner: optax.GradientTransformation
    wrap: Callable[[Any], Any] = lambda tx: tx
    micro_steps: int = 1
    floor: float = 0.0  # what the optimizer itself adds to state that is zero


def _matrices(params):
    return jax.tree.map(lambda w: jnp.ndim(w) > 1, params)


def _labels(params):
    return jax.tree.map(lambda w: "adam" if jnp.ndim(w) == 2 else "sgd", params)


OPTIMIZERS = {
    "adam": Optimizer(optax.adam(1e-2)),
    "adamw": Optimizer(optax.adamw(1e-2, weight_decay=0.1)),
    "sgd": Optimizer(optax.sgd(0.1)),
    "nesterov": Optimizer(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "lion": Optimizer(optax.lion(1e-2)),
    "muon": Optimizer(optax.contrib.muon(1e-2)),
    "adafactor": Optimizer(optax.adafactor(1e-2, momentum=0.9), floor=1e-30),
    "adafactor_factored": Optimizer(optax.adafactor(1e-2, min_dim_size_to_factor=8)),
    "rmsprop": Optimizer(optax.rmsprop(1e-2, momentum=0.9)),
    "adagrad": Optimizer(optax.adagrad(0.1)),
    "lamb": Optimizer(optax.lamb(1e-2)),
    "schedule_free": Optimizer(optax.contrib.schedule_free_adamw(1e-2)),
    "multi_steps_inside": Optimizer(optax.MultiSteps(optax.adam(1e-2), 2)),
    "multi_steps_outside": Optimizer(
        optax.adam(1e-2),
        # Without the last argument MultiSteps never forgets a NaN.
        lambda tx: optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite),
        micro_steps=2,
    ),
    "multi_transform": Optimizer(
        optax.multi_transform({"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1, 0.9)}, _labels)
    ),
    "masked": Optimizer(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.masked(optax.add_decayed_weights(0.1), _matrices),
            optax.adam(1e-2),
        )
    ),
    "inject_hyperparams": Optimizer(
        # In bf16, which it would take from the gradients, b2 = 0.999 is 1.
        optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(
            learning_rate=optax.linear_schedule(1e-2, 1e-3, 9)
        )
    ),
    "apply_if_finite": Optimizer(optax.apply_if_finite(optax.adam(1e-2), 3)),
}


class _Linear(nnx.Module):
    def __init__(self, kernel, bias):
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)


class NNXModel(nnx.Module):
    def __init__(self, kernel, bias, stack):
        self.head, self.stack = _Linear(kernel, bias), nnx.Param(stack)


class _Linen(flax.linen.Module):
    leaves: Any

    @flax.linen.compact
    def __call__(self):
        return [self.param(name, lambda _, x=x: x) for name, x in self.leaves.items()]


@chex.dataclass
class ChexParams:
    kernel: jax.Array
    bias: jax.Array
    stack: jax.Array


@flax.struct.dataclass
class FlaxParams:
    layers: dict
    bias: jax.Array


TREES = {
    "dict": lambda **leaves: {"layers": {"up": leaves}},
    "list": lambda kernel, bias, stack: [[kernel, bias], (stack,)],
    "nnx": lambda **leaves: nnx.state(NNXModel(**leaves), nnx.Param),
    "linen": lambda **leaves: _Linen(leaves).init(jax.random.key(0)),
    "haiku": lambda kernel, bias, stack: {
        "mlp/~/linear": {"w": kernel, "b": bias},
        "mlp/~/scan": {"w": stack},
    },
    "chex": ChexParams,
    "flax": lambda bias, **leaves: FlaxParams(layers=leaves, bias=bias),
}

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}

PACKED = {"bool": False, "packed": True}


def leaves(dtype=jnp.float32, seed=0):
    """Weights of the three kinds, without ties, made without a random number generator."""
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        size = jnp.prod(jnp.array(shape))
        order = (jnp.arange(size, dtype=jnp.float32) * 37 + 11 * seed + 5 * i) % 101
        made[name] = (jnp.where(order % 2, 1, -1) * (1 + order / 32)).reshape(shape).astype(dtype)
    return made


def make_params(tree="dict", dtype=jnp.float32, seed=0):
    return TREES[tree](**leaves(dtype, seed))


def make_updater(name, pattern, params, key=None):
    """The updater, and its plan if the counts follow from shapes."""
    case = UPDATERS[name]
    distribution = case.distribution(pattern)
    updater = case.build(distribution, jax.random.key(3) if key is None else key, params)
    return updater, distribution(params) if case.exact else None


def pairwise(*factors):
    """Few rows such that every pair of values of two factors stands in one; always the same.

    Greedy: take the first pair that is missing and complete its row, factor by factor, with the
    value that brings most missing pairs, among equals the one used least.
    """
    factors = [list(values) for values in factors]
    missing = {
        (i, a, j, b): None
        for i in range(len(factors))
        for j in range(i + 1, len(factors))
        for a in factors[i]
        for b in factors[j]
    }
    used = [dict.fromkeys(values, 0) for values in factors]
    rows = []

    def gain(row, k, value):
        pairs = ((i, a, k, value) if i < k else (k, value, i, a) for i, a in row.items())
        return sum(pair in missing for pair in pairs)

    while missing:
        i, a, j, b = next(iter(missing))
        row = {i: a, j: b}
        for k, values in enumerate(factors):
            if k not in row:
                row[k] = max(values, key=lambda v, k=k: (gain(row, k, v), -used[k][v]))
        for k, value in row.items():
            used[k][value] += 1
            for m, other in row.items():
                missing.pop((k, value, m, other), None)
        rows.append(tuple(row[k] for k in range(len(factors))))
    return rows


class AttentionPattern(NamedTuple):
    """How to build a mask, and whether every query of every head sees itself under causality."""

    build: Callable[..., attention.BlockMask]  # shape, block size, key
    sees_itself: bool = True


def _ids(shape):
    return attention.segment_ids(jnp.array([20, 9, 17]), shape[0])


def _scores(shape, block_size, key):
    blocks = (-(-size // block) for size, block in zip(shape, block_size, strict=True))
    return jax.random.normal(key, (1, 2, *blocks))


ATTENTION_PATTERNS = {  # for 8 blocks of queries and of keys, the last of them not whole
    "causal": AttentionPattern(lambda s, b, key: attention.causal(s, b)),
    "window": AttentionPattern(lambda s, b, key: attention.sliding_window(s, b, left=11, right=3)),
    "sinks": AttentionPattern(lambda s, b, key: attention.sinks(s, b, count=9), False),
    "strided": AttentionPattern(lambda s, b, key: attention.strided(s, b, stride=7)),
    "strided_merged": AttentionPattern(
        lambda s, b, key: attention.strided(s, b, stride=16, merged=True)
    ),
    "fixed": AttentionPattern(lambda s, b, key: attention.fixed(s, b, stride=16, summary=4), False),
    "moa": AttentionPattern(
        lambda s, b, key: attention.moa(s, b, spans=[(8, 0.0), (4, 0.25)], sinks=5)
    ),
    "block_pattern": AttentionPattern(
        lambda s, b, key: attention.block_pattern(lambda i, j: (i - j) % 3 == 0, s, b, causal=True)
    ),
    "s2": AttentionPattern(lambda s, b, key: attention.s2(s, b, heads=4, stride=4, local=1)),
    "power_attention": AttentionPattern(lambda s, b, key: attention.power_attention(s, b)),
    "pixelfly": AttentionPattern(lambda s, b, key: attention.pixelfly(s, b)),
    "random_blocks": AttentionPattern(
        lambda s, b, key: attention.random_blocks(s, b, count=2, key=key, heads=4), False
    ),
    "bigbird": AttentionPattern(
        lambda s, b, key: attention.bigbird(s, b, key=key, random=1, heads=2)
    ),
    "documents": AttentionPattern(lambda s, b, key: attention.documents(_ids(s), b)),
    "anchor_window": AttentionPattern(lambda s, b, key: attention.anchor_window(_ids(s), b)),
    "block_rank": AttentionPattern(
        lambda s, b, key: attention.block_rank(s, b, instruction=8, document=11, count=4)
    ),
    "neighbourhood": AttentionPattern(
        lambda s, b, key: attention.neighbourhood(s, b, grid=(2, 2, 2), before=(1, 0, 1))
    ),
    "uniba": AttentionPattern(lambda s, b, key: attention.uniba(s, b, grid=(2, 4))),
    "top_k_blocks": AttentionPattern(
        lambda s, b, key: attention.top_k_blocks(_scores(s, b, key), s, b, count=3, causal=True)
    ),
    "top_p_blocks": AttentionPattern(
        lambda s, b, key: attention.top_p_blocks(_scores(s, b, key), s, b, mass=0.7)
    ),
}


def fast_jit(fn, **options):
    """Compiled without the optimisations of LLVM, which cost more than they bring here."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **options)


class RouterCase(NamedTuple):
    """A router for 8 experts, and what is known of its routings."""

    router: jsp.moe.Router
    most: int  # choices a token has room for
    sums_to_one: bool = False  # whether the weights of a token do
    causal: bool = True  # whether a token's experts are independent of the other tokens


ROUTERS = {
    "token_choice": RouterCase(jsp.moe.token_choice(2, jitter=0.1), 2, sums_to_one=True),
    "switch": RouterCase(jsp.moe.token_choice(1, normalize=False), 1),
    "loss_free": RouterCase(jsp.moe.loss_free(2), 2, sums_to_one=True),
    "top_p": RouterCase(jsp.moe.top_p(0.5, 4), 4),
    "expert_choice": RouterCase(jsp.moe.expert_choice(2.0), 8, causal=False),
    "threshold_choice": RouterCase(jsp.moe.threshold_choice(2.0, most=4), 4),
    "relu_router": RouterCase(jsp.moe.relu_router(8), 8),
    "hashed": RouterCase(jsp.moe.hashed(2), 2, sums_to_one=True),
    "random": RouterCase(jsp.moe.random(2), 2, sums_to_one=True),
    "given": RouterCase(jsp.moe.given(), 1, sums_to_one=True),
    "among": RouterCase(jsp.moe.among(jsp.moe.token_choice(2)), 2, sums_to_one=True),
}
