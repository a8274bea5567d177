"""Stored blocks on 8 devices: rows of x, columns and rows of a weight, and training them.

Every product is compared with the same one on a single device, on meshes with automatic axes and
with explicit ones, with the mesh set as the context and without.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as jsp
from pallas_kernels import plan

MODES = {
    "auto": (AxisType.Auto, False),
    "explicit": (AxisType.Explicit, False),
    "auto_set": (AxisType.Auto, True),
    "explicit_set": (AxisType.Explicit, True),
}
COLLECTIVE = re.compile(r"(all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(")
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@contextlib.contextmanager
def on_mesh(mode, devices):
    """A mesh of 2 x 4, and a function that lays trees on it."""
    kind, as_context = MODES[mode]
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=devices)

    def lay(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh) if as_context else contextlib.nullcontext():
        yield mesh, lay


def run(fn, *args):
    """The results of a compiled function, and its collectives."""
    compiled = jax.jit(fn).lower(*args).compile(FAST)
    return compiled(*args), COLLECTIVE.findall(compiled.as_text())


def close(got, want):
    def leaf(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max(initial=0)))

    jax.tree.map(leaf, got, want)


def lies_as(x, *spec):
    mesh = x.sharding.mesh
    return x.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), x.ndim)


def weight(seed, *shape, density=0.5):
    return jsp.BlockSparse.random(jax.random.key(seed), shape, block=(4, 4), density=density)


def unbalanced(w):
    """The same blocks without a `fan_in`, the first slot unused."""
    rows = w.topology.rows.at[..., 0].set(w.topology.grid[0])
    return jsp.BlockSparse(w.values, plan(rows, w.topology.cols, w.topology.grid))


def both_ways(values, x):
    """A loss of `x @ w` and `x @ w.T` with several weights; gradients of values and x."""

    def loss(values, x):
        y = x
        for v, t in zip(values, TOPOLOGIES, strict=True):
            w = jsp.BlockSparse(v, t)
            y = jnp.tanh(y @ w) @ w.T
        return jnp.sum(y**2)

    return jax.value_and_grad(loss, (0, 1))(values, x)


WEIGHTS = [weight(0, 16, 24), unbalanced(weight(1, 16, 24))]
TOPOLOGIES = [w.topology for w in WEIGHTS]
VALUES = [w.values for w in WEIGHTS]
X = jax.random.normal(jax.random.key(2), (8, 3, 16))
ROWS = ("data", "model")  # all 8 devices share the rows


@pytest.fixture(scope="module")
def alone():
    return both_ways(VALUES, X)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_x_over_devices(mode, devices, alone):
    with on_mesh(mode, devices) as (_, lay):
        got, used = run(both_ways, lay(VALUES), lay(X, ROWS))
        close(got, alone)
        assert lies_as(got[1][1], ROWS) and lies_as(got[1][0][0])
        assert set(used) == {"all-reduce"}
        if mode.startswith("explicit"):  # no sum inside a loop: one a weight and use, and the loss
            assert len(used) <= 5


def test_values_over_devices_are_gathered(devices, alone):
    with on_mesh("explicit_set", devices) as (_, lay):
        (loss, (dvalues, dx)), used = run(both_ways, lay(VALUES, "data"), lay(X, "data"))
        close((loss, (dvalues, dx)), alone)
        assert all(lies_as(v, "data") for v in dvalues) and lies_as(dx, "data")
        assert "all-gather" in used


def test_inside_shard_map_axes_are_checked(devices, alone):
    """Without `check_vma=False`; gradients of what all devices hold alike are summed over them."""
    with on_mesh("auto", devices) as (mesh, _):

        def local(values, x):
            loss, grads = both_ways(values, x)
            return jax.lax.psum(loss, ROWS), grads

        specs = (P(), P(ROWS))
        got, used = run(
            jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), specs)), VALUES, X
        )
        close(got, alone)
        assert set(used) == {"all-reduce"}


def mlp(weights, x, **options):
    """Columns, then rows of W^T, then row panels."""
    up, down, panels = weights
    hidden = jnp.tanh(jsp.column_parallel(x, up, **options))
    return jsp.row_parallel(hidden, down.T, **options) + jsp.row_parallel(hidden, panels, **options)


def mlp_and_gradients(values, x, **options):
    def loss(values, x):
        weights = [jsp.BlockSparse(v, w.topology) for v, w in zip(values, SHARDED, strict=True)]
        return jnp.sum(mlp(weights, x, **options) ** 2)

    return jax.value_and_grad(loss, (0, 1))(values, x)


def row_panels(w, shards):
    """[K, N] as [shards, K / shards, N], each with its blocks."""
    return jnp.stack(jnp.split(w, shards))


PANELS = row_panels(jax.random.normal(jax.random.key(5), (32, 16)), 4)
SHARDED = [
    weight(3, 16, 32).shard(4),
    weight(4, 16, 32, density=0.25).shard(4),
    jsp.BlockSparse.from_rows(PANELS, (4, 4), jnp.arange(16).reshape(4, 4, 1) % 2),
]
SHARDED_VALUES = [w.values for w in SHARDED]


@pytest.fixture(scope="module")
def mlp_alone():
    return mlp_and_gradients(SHARDED_VALUES, X)


def test_shards_are_the_weight():
    whole = weight(3, 16, 32)
    parts = whole.shard(4)
    assert parts.shape == (16, 8) and parts.values.shape == (4, 4, 4, 4)
    np.testing.assert_array_equal(jnp.concatenate(list(parts.todense()), -1), whole.todense())
    close(jsp.column_parallel(X, parts), X @ whole)
    y = X @ whole
    close(jsp.row_parallel(y, parts.T), y @ whole.T)
    layers = jsp.BlockSparse.random(jax.random.key(0), (2, 8, 16), block=(4, 4), density=0.5)
    np.testing.assert_array_equal(layers.shard(2).todense()[1, 1], layers.todense()[1, :, 8:])


@pytest.mark.parametrize("rows", [None, P("data")])
@pytest.mark.parametrize("mode", MODES)
def test_columns_and_rows_of_weights_over_devices(mode, rows, devices, mlp_alone):
    with on_mesh(mode, devices) as (mesh, lay):
        options = {"rows": rows, "mesh": mesh if mode == "auto" else None}
        values, x = lay(SHARDED_VALUES, "model"), lay(X, "data")
        got, used = run(lambda v, x: mlp_and_gradients(v, x, **options), values, x)
        close(got, mlp_alone)
        (_, (dvalues, dx)) = got
        assert all(lies_as(v, "model") for v in dvalues) and lies_as(dx, "data")
        assert set(used) == {"all-reduce"}  # sums only: no weight or activation is gathered
        y, used = run(lambda x: mlp(SHARDED, x, **options), x)
        assert lies_as(y, "data") and len(used) <= 2


def test_inside_shard_map_of_the_user(devices, mlp_alone):
    with on_mesh("auto", devices) as (mesh, _):

        def local(weights, x):
            def loss(values, x):
                parts = [
                    jsp.BlockSparse(v, w.topology) for v, w in zip(values, weights, strict=True)
                ]
                return jnp.sum(mlp(parts, x) ** 2)

            loss, grads = jax.value_and_grad(loss, (0, 1))([w.values for w in weights], x)
            return jax.lax.psum(loss, "data"), grads

        specs = (P("model"), P("data"))
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), specs))
        close(run(mapped, SHARDED, X)[0], mlp_alone)


def test_more_shards_than_devices(devices):
    whole = weight(3, 16, 32)
    parts, want = whole.shard(8), (X @ whole, X @ whole @ whole.T)
    with on_mesh("explicit_set", devices) as (_, lay):
        w, x = lay(parts, "model"), lay(X, "data")

        def there_and_back(w, x):
            y = jsp.column_parallel(x, w)
            return y, jsp.row_parallel(y, w.T)

        (y, z), _ = run(there_and_back, w, x)
        close((y, z), want)
        assert lies_as(y, "data", None, "model") and lies_as(z, "data")


def test_experts_over_devices(devices):
    experts = jsp.BlockSparse.random(jax.random.key(0), (4, 16, 8), block=(4, 4), density=0.5)
    x = jax.random.normal(jax.random.key(1), (4, 6, 16))
    want = x @ experts
    with on_mesh("explicit_set", devices) as (_, lay):
        y, used = run(lambda x, w: x @ w, lay(x, "model"), lay(experts, "model"))
        close(y, want)
        assert lies_as(y, "model") and not used


class Net:
    """Two sharded layers and a bias; how to make them, and a loss."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(6), 2)
        up = jax.random.normal(keys[0], (16, 32)) / 4
        down = jax.random.normal(keys[1], (32, 16)) / 6
        split = {"up": jnp.stack(jnp.split(up, 4, -1)), "down": row_panels(down, 4)}
        distribution = jsp.uniform(0.5, jsp.Block((4, 4)))
        values, self.blocks = jsp.blockify({**split, "bias": jnp.zeros(16)}, distribution)
        self.params = jsp.add_probes(values, self.blocks)
        self.updater = jsp.block_rigl(
            self.blocks, key=jax.random.key(7), when=jsp.every(2, start=1), drop_fraction=0.5
        )
        self.tx = jsp.sparsify(optax.adam(1e-2), self.updater)

    def step(self, mesh):
        def loss(params, state, x):
            w = self.updater.view(params, state.updater)
            hidden = jnp.tanh(jsp.column_parallel(x, w["up"], mesh=mesh))
            y = jsp.row_parallel(hidden, w["down"], mesh=mesh) + w["bias"]
            return jnp.mean((y - x[..., ::-1]) ** 2)

        def step(params, state, x):
            value, grads = jax.value_and_grad(loss)(params, state, x)
            updates, state = self.tx.update(grads, state, params)
            return value, optax.apply_updates(params, updates), state

        return jax.jit(step, compiler_options=FAST)


@pytest.fixture(scope="module")
def trained():
    net = Net()
    step, params, state = net.step(None), net.params, net.tx.init(net.params)
    history = []
    for t in range(4):
        value, params, state = step(params, state, X + t)
        history.append((value, params, state.updater.blocks["up"].rows))
    assert (history[-1][2] != net.blocks["up"].rows).any()
    return history


@pytest.mark.parametrize(
    ("mode", "spec"),
    [
        ("auto_set", ("model",)),
        ("auto", ("model",)),
        ("explicit_set", ("model",)),
        ("explicit_set", ()),
    ],
)
def test_training_moves_the_blocks_that_it_moves_on_one_device(mode, spec, devices, trained):
    """On 2 x 4 devices, data x model."""
    net = Net()
    with on_mesh(mode, devices) as (mesh, lay):
        params = {k: lay(v) if k == "bias" else lay(v, *spec) for k, v in net.params.items()}
        step, state = net.step(mesh if mode == "auto" else None), net.tx.init(params)
        for t, want in enumerate(trained):
            value, params, state = step(params, state, lay(X + t, "data"))
            close((value, params), want[:2])
            np.testing.assert_array_equal(state.updater.blocks["up"].rows, want[2])
        for leaf in (params["up"], params["down"], state.inner[0].mu["up"]):
            assert lies_as(leaf.values, *spec)


@pytest.mark.parametrize("mode", ["auto_set", "explicit_set"])
@pytest.mark.parametrize("probe", [jsp.sketch_probe(), jsp.exact_probe()], ids=["sketch", "exact"])
def test_probes_measure_the_gradient_of_all_devices(probe, mode, devices):
    """The norm of the sum over devices, and not the sum of norms."""
    net = Net()
    updater = jsp.block_rigl(net.blocks, key=jax.random.key(0), when=jsp.every(1), probe=probe)
    state, x = updater.init(net.params), X[:, 0]

    def measured(params, x):
        def loss(params):
            w = updater.view(params, state)
            up = jax.tree.map(lambda a: a[0], w["up"])  # one shard, on every device
            y = jnp.sum((x @ up) ** 2) + jnp.sum((x[:, :8] @ up.T) ** 2)
            return y + jnp.sum(jsp.column_parallel(x, w["up"]) ** 2)

        return jax.grad(loss)(params)["up"].probe

    want = jax.jit(measured)(net.params, x)
    with on_mesh(mode, devices) as (_, lay):
        close(run(measured, lay(net.params), lay(x, "data"))[0], want)


def test_errors(devices):
    whole = weight(3, 16, 32)
    parts = whole.shard(4)
    with pytest.raises(ValueError, match=r"shard\(3\) needs .* multiple of 3 .* 8 columns"):
        whole.shard(3)
    with pytest.raises(ValueError, match=r"shard\(2\) needs .* fan_in=None"):
        unbalanced(whole).shard(2)
    with pytest.raises(ValueError, match=r"a stack \[n\] of weights.*w.shard\(n\)"):
        jsp.column_parallel(X, whole)
    with pytest.raises(ValueError, match=r"split its rows.*must be 64; got \(8, 3, 16\)"):
        jsp.row_parallel(X, parts)
    with on_mesh("auto_set", devices):
        with pytest.raises(ValueError, match=r"none of which is 'tensor'"):
            jsp.column_parallel(X, parts, "tensor")
        with pytest.raises(ValueError, match=r"2 shards do not divide over the 4 devices"):
            jsp.column_parallel(X, whole.shard(2))
    with on_mesh("explicit_set", devices) as (_, lay):
        wide = lay(jnp.ones((2, 16)), None, "model")
        with pytest.raises(ValueError, match=r"the last axis of x lies over .* row_parallel"):
            wide @ whole
        with pytest.raises(ValueError, match=r"the last axis of x lies over .* row_parallel"):
            jsp.column_parallel(wide, parts)
