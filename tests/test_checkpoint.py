"""Checkpoints: every leaf comes back as it was, and no kill or damage gives a wrong state."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsparse.checkpoint import Checkpointer, _folders, restore_masks

PARAMS = {"w": jnp.arange(12.0).reshape(3, 4)}


def folders(directory):
    """Committed folders, oldest first."""
    return sorted(p for p in Path(directory).iterdir() if not p.name.endswith("tmp"))


def steps(directory):
    return [int(path.name.split("-")[-1]) for path in folders(directory)]


def params_at(step):
    return {"w": PARAMS["w"] + step}


def save_steps(directory, *numbers, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in numbers:
            checkpointer.save(
                step,
                params=params_at(step),
                opt_state={"mu": jnp.full(3, step)},
                masks={"w": PARAMS["w"] > step},
                data=step,
            )


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def restored(directory, like_params=PARAMS, like_opt_state=None, step=None, **options):
    with Checkpointer(directory, **options) as checkpointer:
        return checkpointer.restore(like_params, like_opt_state, step)


def assert_same(got, want):
    """Same containers, types, dtypes, weak types and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        if isinstance(b, jax.Array) and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


LEAVES = {
    "f32": jnp.array([1e-45, -0.0, jnp.nan, jnp.inf]),
    "bf16": jnp.array([[0.1, -3.0]], jnp.bfloat16),
    "f8": jnp.array([0.5, 448.0], jnp.float8_e4m3fn),
    "i4": jnp.array([-8, 7], jnp.int4),
    "i32": jnp.array([-(2**31), 2**31 - 1], jnp.int32),
    "u8": jnp.array([[0, 255, 170]], jnp.uint8),
    "c64": jnp.array([1 + 2j], jnp.complex64),
    "bool": jnp.array([[True, False], [False, True]]),
    "kept": jnp.array(True),
    "scalar": jnp.array(3, jnp.int32),
    "weak": jnp.asarray(0.1),
    "weak_full": jnp.full((2, 3), -7),
    "empty": jnp.zeros((0, 3), jnp.bfloat16),
    "key": jax.random.key(1),
    "keys": jax.random.split(jax.random.key(2, impl="rbg"), (2, 3)),
    "mlp/~/linear_0": {"w.b": jnp.ones(2), "é ü": jnp.zeros(1)},
    "none": None,
    "nothing": {"list": [], "tuple": (), "state": optax.EmptyState(), "node": optax.MaskedNode()},
    "list": [jnp.ones(1), (jnp.zeros(1), None)],
}
HOST = {"f64": np.array([0.1]), "np": np.int64(3), "int": 3, "float": 0.1, "bool": True}


def test_every_kind_of_leaf_comes_back(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, params=LEAVES, opt_state=LEAVES | HOST)
        got = checkpointer.restore(jax.eval_shape(lambda: LEAVES), LEAVES | HOST)
        # Whether a leaf promotes like a Python number is a fact of the run, not of the template.
        strong = {"weak": jnp.zeros(()), "weak_full": jnp.zeros((2, 3), int)}
        again = checkpointer.restore(LEAVES | strong)
    assert_same(got.params, LEAVES)
    assert_same(got.opt_state, LEAVES | HOST)
    assert_same(again.params, LEAVES)
    assert (got.params["weak"] * LEAVES["bf16"]).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9)),
        optax.multi_transform({"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, {"w": "a", "b": "b"}),
        optax.MultiSteps(optax.adafactor(1e-2), 2),
        optax.inject_hyperparams(optax.adamw)(learning_rate=optax.constant_schedule(1e-2)),
    ],
    ids=["adam", "chain", "multi_transform", "multi_steps", "inject"],
)
def test_optimizer_states_get_their_types_from_the_template(tmp_path, tx):
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, params=params, opt_state=state)
        template = jax.eval_shape(lambda: jax.jit(tx.update)(params, tx.init(params), params)[1])
        assert_same(checkpointer.restore(params, template).opt_state, state)


def test_nnx_state_comes_back_into_the_model(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(
            1, params=nnx.state(model), masks=jax.tree.map(lambda x: x > 0, nnx.state(model))
        )
        other = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
        got = checkpointer.restore(nnx.eval_shape(lambda: nnx.state(other)))
    assert isinstance(got.params, nnx.State)
    nnx.update(other, got.params)
    chex.assert_trees_all_equal(other(jnp.ones(2)), model(jnp.ones(2)))
    assert list(restore_masks(tmp_path)) == ["bias", "kernel"]
    masks = restore_masks(tmp_path, like=nnx.state(other))
    chex.assert_trees_all_equal(masks.kernel.get_value(), model.kernel.get_value() > 0)


def test_sharded_arrays_go_where_the_template_says(tmp_path, devices):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    rows, columns = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ("x", (None, "y")))
    w = jnp.arange(64.0).reshape(8, 8)
    state = {"w": jax.device_put(w, rows), "keys": jax.random.split(jax.random.key(0), 8)}
    state["keys"] = jax.device_put(state["keys"], rows)
    count = jnp.array(5)
    with Checkpointer(tmp_path) as checkpointer:
        mask = {"w": jax.device_put(w > 9, rows)}
        checkpointer.save(1, params=state, opt_state={"count": count}, masks=mask)
        same = checkpointer.restore(state, {"count": count})
        like = {"w": jax.ShapeDtypeStruct((8, 8), w.dtype, sharding=columns), "keys": state["keys"]}
        other = checkpointer.restore(like).params["w"]
        single = checkpointer.restore(jax.eval_shape(lambda: state)).params["w"]
    assert same.params["w"].sharding == rows and same.params["keys"].sharding == rows
    assert other.sharding == columns and single.sharding.device_set == {devices[0]}
    assert_same(same.params, state)
    chex.assert_trees_all_equal(other, w)
    np.testing.assert_array_equal(restore_masks(tmp_path)["w"], w > 9)
    # Uncommitted as before, so it still meets arrays of any mesh.
    assert not same.opt_state["count"].committed and not single.committed
    chex.assert_trees_all_equal(jax.jit(lambda a, b: a + b)(same.params["w"], single), 2 * w)


def test_abstract_template_of_a_mesh_with_explicit_axes(tmp_path, devices):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,), devices=devices)
    sharded = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("x")))
    with jax.set_mesh(mesh), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, params={"w": sharded})
        got = checkpointer.restore(jax.eval_shape(lambda x: {"w": 2 * x}, sharded)).params["w"]
    assert got.sharding == sharded.sharding
    chex.assert_trees_all_equal(got, sharded)


def test_donated_and_changed_buffers_do_not_reach_a_running_save(tmp_path, monkeypatch, devices):
    go, write = threading.Event(), _folders.write_manifest
    monkeypatch.setattr(_folders, "write_manifest", lambda *a: go.wait(10) and write(*a))
    step = jax.jit(lambda tree: jax.tree.map(lambda w: w * 2 + 1, tree), donate_argnums=0)
    rows = NamedSharding(jax.make_mesh((8,), "x", (AxisType.Auto,)), PartitionSpec("x"))
    for number in range(3):
        like = {"w": jnp.zeros(1 << 16), "sharded": jax.device_put(jnp.zeros(1 << 16), rows)}
        tree = {name: w + number + jnp.arange(1 << 16) for name, w in like.items()}
        host = np.arange(1000) + number
        with Checkpointer(tmp_path) as checkpointer:
            go.clear()
            checkpointer.save(number, params=tree, opt_state=host)
            host += 1
            for _ in range(10):
                old, tree = tree, step(tree)
            assert all(w.is_deleted() for w in jax.tree.leaves(old))  # donation is real here
            jax.block_until_ready(tree)
            go.set()
            got = checkpointer.restore(like, host)
        for w in got.params.values():
            np.testing.assert_array_equal(w, number + np.arange(1 << 16))
        np.testing.assert_array_equal(got.opt_state, number + np.arange(1000))


def test_saving_is_asynchronous_and_commits_last(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    go, write = threading.Event(), _folders.write_manifest
    monkeypatch.setattr(_folders, "write_manifest", lambda *a: go.wait(10) and write(*a))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, params=params_at(2), opt_state={"mu": jnp.zeros(3)})
        assert steps(tmp_path) == [1]  # save() has returned, and nothing is committed
        with pytest.warns(UserWarning, match=r"000001-step-2\S* \(never finished\).*000000-step-1"):
            assert restored(tmp_path).step == 1
        go.set()
    assert restored(tmp_path).step == 2


def test_an_error_in_the_background_is_raised_and_the_next_save_works(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(_folders, "write_manifest", full)
        checkpointer.save(1, params=params_at(1))
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(2, params=params_at(2))
    checkpointer.save(3, params=params_at(3))
    checkpointer.close()
    assert steps(tmp_path) == [3]
    assert_same(restored(tmp_path).params, params_at(3))


# Every file of each item flipped; every file of one cut by a byte, and deleted.
DAMAGES = [(flip, item) for item in ("params", "opt_state", "masks", "manifest")]
DAMAGES += [(truncate, "params"), (Path.unlink, "params"), (Path.unlink, "manifest")]


@pytest.mark.parametrize(("harm", "item"), DAMAGES)
def test_damage_to_any_file_is_found_and_the_one_before_used(tmp_path, harm, item):
    save_steps(tmp_path / "good", 1, 2)
    (folder,) = [f for f in folders(tmp_path / "good") if f.name.endswith("-2")]
    files = (folder / item).rglob("*") if item != "manifest" else [folder / "jaxsparse.json"]
    names = sorted(file.relative_to(folder) for file in files if file.is_file())
    assert names
    for number, name in enumerate(names):
        bad = shutil.copytree(tmp_path / "good", tmp_path / str(number))
        harm(bad / folder.name / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Checkpointer(bad) as checkpointer:
                assert checkpointer.latest_step() == 1
                got = checkpointer.restore(PARAMS, {"mu": jnp.zeros(3, int)})
        # Masks are not read here, so damage to them does not hurt.
        want = 2 if item == "masks" else 1
        assert (got.step, got.data) == (want, want)
        assert_same(got.params, params_at(want))
        assert_same(got.opt_state, {"mu": jnp.full(3, want)})
        for warning in caught:
            text = str(warning.message)
            assert f"{folder.name} ({name} " in text and "000000-step-1, is used" in text
        assert len(caught) == (1 if item == "masks" else 2)
        assert steps(bad) == [1, 2]  # nothing is deleted by reading


def test_orbax_files_outside_the_items_do_not_matter(tmp_path):
    save_steps(tmp_path, 1)
    (folder,) = folders(tmp_path)
    files = [f for f in folder.iterdir() if f.is_file() and f.name != "jaxsparse.json"]
    assert files
    for file in files:
        flip(file)
        assert_same(restored(tmp_path).params, params_at(1))
        file.unlink()
        assert_same(restored(tmp_path).params, params_at(1))


def test_parts_that_are_not_asked_for_may_be_damaged(tmp_path):
    save_steps(tmp_path, 1)
    shutil.rmtree(folders(tmp_path)[0] / "opt_state")
    assert_same(restored(tmp_path).params, params_at(1))
    np.testing.assert_array_equal(restore_masks(tmp_path)["w"], PARAMS["w"] > 1)
    with pytest.raises(RuntimeError, match=r"000000-step-1 \(opt_state/\S+ is missing\)"):
        restored(tmp_path, PARAMS, {"mu": jnp.zeros(3, int)})


def test_nothing_sound_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert restored(tmp_path / "new") is None
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.latest_step() is None
    with pytest.raises(FileNotFoundError, match="new"):
        restore_masks(tmp_path / "new")
    save_steps(tmp_path, 1, 2)
    for folder in folders(tmp_path):
        if folder.name != "new":
            truncate(folder / "jaxsparse.json")
    with pytest.raises(
        RuntimeError, match=r"step-2 \(jaxsparse.json was altered\).*step-1.*start anew"
    ):
        restored(tmp_path)


def test_a_first_save_that_was_cut_off_means_starting_anew(tmp_path):
    save_steps(tmp_path, 1)
    (folder,) = folders(tmp_path)
    folder.rename(folder.with_name(folder.name + ".orbax-checkpoint-tmp"))
    with pytest.warns(UserWarning, match="never finished.*none is before it"):
        assert restored(tmp_path) is None
    save_steps(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["000001-step-2"]  # and the remains are gone


def test_remains_of_a_cut_off_save_go_before_older_sound_ones(tmp_path):
    save_steps(tmp_path, 1, 2)
    cut_off = folders(tmp_path)[-1]
    cut_off.rename(cut_off.with_name(cut_off.name + ".orbax-checkpoint-tmp"))
    save_steps(tmp_path, 3, 4, keep=3)
    assert steps(tmp_path) == [1, 3, 4] and len(list(tmp_path.iterdir())) == 3


def test_a_process_does_not_hash_again_what_it_wrote(tmp_path, monkeypatch):
    hashed, digest = [], _folders._digest
    monkeypatch.setattr(_folders, "_digest", lambda path: hashed.append(str(path)) or digest(path))
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert hashed and all("tmp" in path.removeprefix(str(tmp_path)) for path in hashed)


def test_a_damaged_step_can_be_saved_again(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip(folders(tmp_path)[-1] / "jaxsparse.json")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(UserWarning, match="step-2"):
            assert checkpointer.restore(PARAMS).step == 1
        checkpointer.save(2, params=params_at(20))
        assert_same(checkpointer.restore(PARAMS).params, params_at(20))
        assert_same(checkpointer.restore(PARAMS, step=2).params, params_at(20))
    assert steps(tmp_path) == [1, 2, 2]


def test_going_back_to_an_older_step_makes_it_the_newest(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(PARAMS, step=1).data == 1
        checkpointer.save(2, params=params_at(20))
        assert_same(checkpointer.restore(PARAMS).params, params_at(20))
    with pytest.raises(ValueError, match=r"no checkpoint of step 7, only of \[2, 3\]"):
        restored(tmp_path, step=7)
    assert steps(tmp_path) == [2, 3, 2]


def test_keep_counts_sound_checkpoints(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert steps(tmp_path) == [4, 5]
    truncate(next(f for f in (folders(tmp_path)[1] / "params").rglob("*") if f.is_file()))
    save_steps(tmp_path, 6, keep=2)  # another process: it must hash 4 and 5 to know
    assert steps(tmp_path) == [4, 5, 6]
    save_steps(tmp_path, 7, keep=2)
    assert steps(tmp_path) == [6, 7]
    flip(next(f for f in (folders(tmp_path)[1] / "masks").rglob("*") if f.is_file()))
    save_steps(tmp_path, 8, keep=2)
    assert steps(tmp_path) == [6, 7, 8]


def test_the_only_sound_checkpoint_is_never_removed(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, keep=1)

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_folders, "write_manifest", full)
        with pytest.raises(OSError, match="No space"):
            save_steps(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [1]
    save_steps(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3]


CONFIG = {"model": {"depth": 4, "width": 64}, "optimizer": "adam", "sizes": (1, 2)}


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (CONFIG | {"model": {"depth": 6, "width": 64}}, "model/depth is 4 there and 6 here"),
        (CONFIG | {"sizes": [1, 3]}, "sizes/1 is 2 there and 3 here"),
        (CONFIG | {"seed": 0}, "seed is absent there and 0 here"),
        ({k: CONFIG[k] for k in ("model", "sizes")}, "optimizer is adam there and absent here"),
    ],
)
def test_another_config_is_refused_before_anything_happens(tmp_path, other, difference):
    save_steps(tmp_path, 1, config=CONFIG)
    for _ in range(2):
        with pytest.raises(ValueError, match=difference) as error:
            Checkpointer(tmp_path, config=other)
        assert str(tmp_path) in str(error.value) and "another directory" in str(error.value)
        assert "width" not in str(error.value)
        # The newest that can be read decides.
        save_steps(tmp_path, 2, config=CONFIG)
        flip(folders(tmp_path)[-1] / "jaxsparse.json")
    assert restored(tmp_path, step=1, config=CONFIG).step == 1


def test_the_config_is_known_without_being_given(tmp_path):
    save_steps(tmp_path, 1, config=CONFIG)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.config == CONFIG | {"sizes": [1, 2]}
        checkpointer.save(2, params=PARAMS)
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        assert checkpointer.latest_step() == 2
    manifest = json.loads((folders(tmp_path)[-1] / "jaxsparse.json").read_text().split("\n")[1])
    assert manifest["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        ({"w": jnp.zeros((3, 5))}, r"w is float32\[3, 4\] there and float32\[3, 5\] here"),
        ({"w": jnp.zeros((3, 4), "bfloat16")}, r"w is float32\[3, 4\] there and bfloat16\[3, 4\]"),
        ({"w": PARAMS["w"], "b": jnp.zeros(1)}, r"b is absent there and float32\[1\] here"),
        ({}, r"w is float32\[3, 4\] there and absent here"),
        ({"v": [PARAMS["w"]] * 9}, r"v/0 is absent.*; and 5 more"),
    ],
)
def test_a_template_that_differs_is_one_clear_error(tmp_path, like, difference):
    save_steps(tmp_path, 1)
    with pytest.raises(ValueError, match=difference) as error:
        restored(tmp_path, like)
    assert "000000-step-1" in str(error.value) and "another params" in str(error.value)
    with pytest.raises(ValueError, match="another opt_state: .*mu is int32"):
        restored(tmp_path, PARAMS, {"mu": like.get("w", jnp.zeros(()))})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"step": -1}, ValueError, "got -1"),
        ({"step": 1.5}, TypeError, "float"),
        ({"params": {"a": {"b": "text"}}}, TypeError, "Leaf a/b .* got 'text'"),
        ({"opt_state": [object()]}, TypeError, "Leaf 0 must be an array"),
        ({"params": {"a/b": 1.0, "a": {"b": 2.0}}}, ValueError, "Two leaves have the path a/b"),
        ({"masks": {"w": jnp.ones(3)}}, TypeError, "Mask w must be bool; got float32.*jsp.masks"),
        ({"data": {"position": np.arange(2)}}, TypeError, "not JSON serializable"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, options, error, text):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(error, match=text):
            checkpointer.save(**{"step": 1, "params": PARAMS} | options)
    assert not list(tmp_path.iterdir())


def test_bad_directory_or_keep(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises((NotADirectoryError, FileExistsError), match="file"):
        Checkpointer(tmp_path / "file")
    with pytest.raises(TypeError, match="not JSON serializable"):
        Checkpointer(tmp_path, config={"tx": optax.adam})


def test_masks_alone(tmp_path, key):
    masks = {
        "layers": [
            {"kernel": jax.random.bernoulli(key, 0.3, shape)} for shape in ((2, 5, 7), (3, 1))
        ],
        "bias": jnp.array(True),
        "plain": True,
        "np": np.array([False, True]),
        "empty": jnp.ones((0, 4), bool),
    }
    params = jax.tree.map(lambda mask: jnp.zeros(np.shape(mask)), masks)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, params=params, masks=masks)
        checkpointer.save(4, params=params)
    with pytest.raises(ValueError, match="step-4 has no masks.*jsp.masks"):
        restore_masks(tmp_path)
    got = restore_masks(tmp_path, step=3)
    assert list(got) == ["bias", "empty", "layers/0/kernel", "layers/1/kernel", "np", "plain"]
    assert all(mask.dtype == bool for mask in got.values())
    chex.assert_trees_all_equal(list(got.values()), [np.asarray(m) for m in jax.tree.leaves(masks)])
    like = restore_masks(tmp_path, step=3, like=jax.eval_shape(lambda: params))
    assert_same(like, jax.tree.map(jnp.asarray, masks))
    with pytest.raises(ValueError, match="bias is a leaf there and absent here"):
        restore_masks(tmp_path, step=3, like={"layers": params["layers"]})


def test_a_resumed_run_has_the_same_bits(tmp_path):
    tx = optax.adam(1e-2)
    tokens = np.random.default_rng(0).normal(size=(10, 4, 3)).astype(np.float32)

    def loss(params, x, key):
        x = x * jax.random.bernoulli(key, 0.8, x.shape)
        return jnp.mean((jnp.tanh(x @ params["w"]) - params["b"]) ** 2)

    @jax.jit
    def first(key):
        params = {"w": jax.random.normal(key, (3, 5)), "b": jnp.zeros(5)}
        return params, tx.init(params), key

    def advance(params, state, key, x):
        key, use = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(params, x, use)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, key, value

    advance = jax.jit(advance, donate_argnums=(0, 1))

    def train(directory, stop):
        like = jax.eval_shape(first, jax.random.key(0))
        losses = []
        with Checkpointer(directory, config={"lr": 1e-2}) as checkpointer:
            found = checkpointer.restore({"model": like[0], "key": like[2]}, like[1])
            if found is None:
                (params, state, key), position = first(jax.random.key(0)), 0
            else:
                params, key = found.params["model"], found.params["key"]
                state, position = found.opt_state, found.data["position"]
            for at in range(position, stop):
                params, state, key, value = advance(params, state, key, tokens[at])
                losses.append(value)
                if at % 2:
                    saved = {"model": params, "key": key}
                    data = {"position": at + 1}
                    checkpointer.save(at + 1, params=saved, opt_state=state, data=data)
        return params, state, losses

    whole = train(tmp_path / "whole", 10)
    train(tmp_path / "parts", 5)
    parts = train(tmp_path / "parts", 10)
    assert len(parts[2]) == 6  # from step 4 on
    assert_same(parts[:2], whole[:2])
    assert_same(parts[2], whole[2][4:])


# Imports once, then a fork for each kill: (signal, after which save, how many ms later).
KILLED = """
import os, signal, sys, time
import jax.numpy as jnp
import numpy as np
from jaxsparse.checkpoint import Checkpointer

def run(directory, out):
    with Checkpointer(directory, keep=2) as checkpointer:
        for step in range(1000):
            params = {str(i): jnp.asarray(np.full(1 << 14, step, np.float32)) for i in range(4)}
            masks = {"0": np.full(1 << 14, step > 2)}
            checkpointer.save(step, params=params, masks=masks, data=step)
            out.write(f"{step}\\n")

for number, kill in enumerate(sys.argv[2:]):
    sign, after, delay = map(int, kill.split(","))
    read, write = map(os.fdopen, os.pipe(), "rw", (1, 1))
    pid = os.fork()
    if not pid:
        read.close()
        sys.exit(run(f"{sys.argv[1]}/{number}", write))
    write.close()
    while int(read.readline()) < after:
        pass
    time.sleep(delay / 1000)
    os.kill(pid, sign)
    last = [after, *map(int, read.read().split())][-1]
    os.waitpid(pid, 0)
    print(last)
"""


def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(tmp_path):
    kills = [(signal.SIGKILL, 1 + i % 3, 6 * i) for i in range(7)]
    kills += [(signal.SIGINT, 2, 20 * i) for i in range(2)]
    command = [sys.executable, "-c", KILLED, tmp_path, *(",".join(map(str, k)) for k in kills)]
    done = subprocess.run(
        list(map(str, command)),
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    started = list(map(int, done.stdout.split()))
    assert len(started) == len(kills)
    cut_off = 0
    for number, last in enumerate(started):
        directory = tmp_path / str(number)
        cut_off += any(path.name.endswith("tmp") for path in directory.iterdir())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*never finished")
            like = {str(i): jnp.zeros(1 << 14) for i in range(4)}
            found = restored(directory, like)
        # Save n returns when save n - 1 has ended, so only the last one can be lost.
        assert found.data == found.step >= last - 1
        assert_same(
            found.params, {name: jnp.full(1 << 14, found.step, jnp.float32) for name in like}
        )
        assert restore_masks(directory, step=found.step)["0"].all() == (found.step > 2)
    assert cut_off  # the kills did hit running saves
