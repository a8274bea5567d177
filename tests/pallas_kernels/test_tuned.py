"""Measured tiles: how they are found, when they are not taken, and the command that writes them."""

import json

import pytest

from experiments import bench_tpu
from experiments.tune_kernels import keep
from pallas_kernels import _tuned
from pallas_kernels._block_sparse_tpu import Config, choose_config, default_config, problem
from pallas_kernels._compat import Tpu

V5E = Tpu(128 * 2**20, 128, name="tpu_v5e")
SHAPE = (8192, 4096, 128, (128, 128), 1024, "bfloat16")  # m, depth, outs, block, slots, dtype
TILES = {"bm": 512, "group": 4, "merge": False, "cores": 1, "strip": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    _tuned.read.cache_clear()
    yield tmp_path
    _tuned.read.cache_clear()


def entry(*shape, gradient=False, **tiles):
    return {"problem": problem(*shape, gradient), "tiles": TILES | tiles}


def test_the_shape_most_like_it_is_taken(folder):
    far, near = (4096, *SHAPE[1:]), (8000, *SHAPE[1:])
    keep([entry(*far, group=2), entry(*near)], {}, folder / "tpu_v5e.json")
    assert choose_config(*SHAPE, V5E) == Config(512, 4) != default_config(*SHAPE, V5E)
    assert choose_config(*far, V5E) == Config(512, 2)
    # Rows are cut evenly, as for the default: 2 panels of 304 and not one of 512 and one of 88.
    keep([entry(600, *SHAPE[1:])], {}, folder / "tpu_v5e.json")
    assert choose_config(600, *SHAPE[1:], V5E) == Config(304, 4)


@pytest.mark.parametrize(
    ("change", "value"),
    [(0, 3000), (1, 8192), (3, (256, 128)), (4, 128), (5, "float32")],
)
def test_another_shape_gets_the_default(folder, change, value):
    keep([entry(*SHAPE)], {}, folder / "tpu_v5e.json")
    other = [*SHAPE]
    other[change] = value
    assert choose_config(*other, V5E) == default_config(*other, V5E)


def test_another_device_or_kernel_gets_the_default(folder):
    keep([entry(*SHAPE)], {}, folder / "tpu_v5e.json")
    for device in (Tpu(128 * 2**20, 128), Tpu(128 * 2**20, 256, name="tpu_v6e")):
        assert choose_config(*SHAPE, device) == default_config(*SHAPE, device)
    default = default_config(*SHAPE, V5E, gradient=True)
    assert choose_config(*SHAPE, V5E, gradient=True) == default
    keep([entry(*SHAPE, gradient=True, strip=3)], {}, folder / "tpu_v5e.json")
    assert choose_config(*SHAPE, V5E, gradient=True) == Config(512, 4, strip=3)
    assert choose_config(*SHAPE, V5E) == Config(512, 4)  # kept beside the new one


@pytest.mark.parametrize("tiles", [{"bm": 8192}, {"cores": 2}])
def test_tiles_that_do_not_fit_are_not_taken(folder, tiles):
    keep([entry(*SHAPE, **tiles)], {}, folder / "tpu_v5e.json")
    assert choose_config(*SHAPE, V5E) == default_config(*SHAPE, V5E)


def test_files_in_the_package_are_read_and_say_where_they_are_from():
    for path in _tuned.FOLDER.glob("*.json"):
        kept = json.loads(path.read_text())
        assert {"device", "jax", "date"} <= kept["setting"].keys()
        for one in kept["entries"]:
            assert one["us"] <= one["default us"] and Config(**one["tiles"])


def test_the_command_for_a_tpu_runs_dry(tmp_path, capsys):
    bench_tpu.main(["--dry", "--tuned", f"{tmp_path}/tuned", "--results", f"{tmp_path}/results"])
    (tuned,), (results,) = (list((tmp_path / name).iterdir()) for name in ("tuned", "results"))
    entries = json.loads(tuned.read_text())["entries"]
    assert [one["problem"]["kernel"] for one in entries] == [
        *["block_sparse_matmul"] * 2,
        "block_sparse_gradient",
    ]
    assert all(one["problem"]["rows"] == 32 and Config(**one["tiles"]) for one in entries)
    (measured,) = json.loads(results.read_text())["measured"]
    for table in ("default tiles", "tuned tiles"):
        assert {"forward", "forward + backward", "dx", "dw"} < measured[table][0].keys()
    assert capsys.readouterr().out.count("  ok ") == 2


def test_the_command_for_a_tpu_does_not_measure_elsewhere(capsys):
    for arguments, said in (([], "not a TPU; --dry"), (["--dry"], "give --tuned and --results")):
        with pytest.raises(SystemExit):
            bench_tpu.main(arguments)
        assert said in capsys.readouterr().err


def test_wrong_results_end_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_tpu, "interpreted", lambda x, values, dy, topology: (dy, x, values))
    monkeypatch.setattr(bench_tpu, "CASES", bench_tpu.CASES[:2])
    arguments = ["--dry", "--tuned", str(tmp_path / "t"), "--results", str(tmp_path / "r")]
    with pytest.raises(SystemExit, match=r"wrong results in \['ragged rows'\]"):
        bench_tpu.main(arguments)
    assert not list(tmp_path.iterdir())
