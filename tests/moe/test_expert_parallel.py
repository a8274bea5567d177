"""Experts on 8 devices give what one device gives: output and gradients, for any load."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.tpu_compile import devices_of
from jaxsparse import moe
from pallas_kernels import grouped_ffn, grouped_matmul
from tests.pallas_kernels.tpu import needs_libtpu

P = PartitionSpec
DEVICES, E, T, D, N, K = 4, 8, 40, 6, 5, 2  # T tokens in all, 10 a device


def on_devices(apply, devices, rows=None):
    mesh = jax.make_mesh((DEVICES,), ("expert",), (AxisType.Auto,), devices=devices[:DEVICES])

    def local(x, weights, experts, w):
        routing = moe.Routing(weights, experts, jnp.zeros(()))
        run = lambda r, sizes: grouped_matmul(r, w, sizes)  # noqa: E731
        return apply(x, routing, E, run, axis="expert", rows=rows)

    each = P("expert")
    return jax.shard_map(local, mesh=mesh, in_specs=(each,) * 4, out_specs=each)


def on_one(x, weights, experts, w):
    run = lambda r, sizes: grouped_matmul(r, w, sizes)  # noqa: E731
    return moe.apply_experts(x, moe.Routing(weights, experts, jnp.zeros(())), E, run)


def problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (T, D))
    weights = jax.random.uniform(keys[1], (T, K))
    experts = jax.random.randint(keys[2], (T, K), 0, E + 1)  # E: not used
    return x, weights, experts, jax.random.normal(keys[3], (E, D, N))


def results(apply):
    def loss(x, weights, w, experts):
        y = apply(x, weights, experts, w)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.fixture(scope="module")
def compiled(devices):
    return [results(f) for f in (on_one, *(on_devices(a, devices) for a in WAYS))]


WAYS = (moe.gathered, moe.exchanged)


@pytest.mark.parametrize("load", ["random", "all to one expert", "nobody", "one device's experts"])
def test_as_on_one_device(compiled, load):
    x, weights, experts, w = problem()
    if load == "all to one expert":
        experts = jnp.full((T, K), 5)
    elif load == "nobody":
        experts = jnp.full((T, K), E)
    elif load == "one device's experts":
        experts = experts % 2 + 6
    want, *got = (run(x, weights, w, experts) for run in compiled)
    for result in got:
        chex.assert_trees_all_close(result, want, atol=2e-5)


@pytest.mark.parametrize("apply", WAYS)
def test_what_finds_no_room_contributes_nothing(apply, devices):
    x, weights, experts, w = problem()
    rows = 12
    got = results(on_devices(apply, devices, rows))(x, weights, w, experts)
    # By hand: what each device takes, in the stated order.
    kept, owner = np.full((T, K), E), np.arange(T) // (T // DEVICES)
    for device in range(DEVICES):
        mine = [
            (int(experts[t, k]), t, k)
            for t in range(T)
            for k in range(K)
            if experts[t, k] // (E // DEVICES) == device
        ]
        by_sender = lambda c: (owner[c[1]], c)  # noqa: E731
        order = sorted(mine, key=by_sender if apply is moe.exchanged else None)
        for expert, t, k in order[:rows]:
            kept[t, k] = expert
    assert 0 < (kept == E).sum() - (np.asarray(experts) == E).sum()
    want = results(on_one)(x, weights, w, jnp.asarray(kept))
    chex.assert_trees_all_close(got, want, atol=2e-5)


def test_experts_that_do_not_divide_are_named(devices):
    mesh = jax.make_mesh((3,), ("expert",), (AxisType.Auto,), devices=devices[:3])
    routing = moe.token_choice(1).route(jnp.ones((3, E)), ())
    call = partial(moe.exchanged, experts=E, run=lambda r, s: r, axis="expert")
    with pytest.raises(ValueError, match="8 experts do not divide among the 3 devices"):
        jax.shard_map(
            lambda x, r: call(x, r), mesh=mesh, in_specs=(P("expert"), P()), out_specs=P("expert")
        )(jnp.ones((3, D)), routing)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4"])
@needs_libtpu
def test_a_train_step_on_sixteen_chips_compiles(topology, monkeypatch):
    """Forward and backward with our kernels, 64 experts on 4 devices, tokens on all 16."""
    monkeypatch.setattr("pallas_kernels._op.here", lambda: "tpu")
    chips = np.array(devices_of(topology)).reshape(4, 4)
    mesh = Mesh(chips, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    tokens, whole = P(("data", "expert")), P("expert")

    def local(x, logits, *weights):
        routing = moe.token_choice(2).route(logits, ())
        run = lambda rows, sizes: grouped_ffn(rows, *weights, sizes)  # noqa: E731
        y = moe.exchanged(x, routing, 64, run, axis="expert", rows=4 * x.shape[0])
        return jnp.sum(y.astype(jnp.float32) ** 2)[None]

    def loss(*operands):
        specs = (tokens, tokens, whole, whole, whole)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens)(*operands).sum()

    def struct(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    structs = (
        struct(tokens, 16 * 512, 1024),
        struct(tokens, 16 * 512, 64, dtype=jnp.float32),
        *(struct(whole, 64, 1024, 512) for _ in range(2)),
        struct(whole, 64, 512, 1024),
    )
    lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).trace(*structs).lower()
    assert "ragged_all_to_all" in lowered.as_text() and "grouped" in lowered.as_text()
    compiled = lowered.compile()
    # Room for 4 rows a token of this device, whatever the others send.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**29
