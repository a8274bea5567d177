"""The TPU kernel of decode attention: interpreted, compiled, and its schedule."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tpu_decode
from pallas_kernels import _op
from pallas_kernels import _sparse_decode as op
from pallas_kernels import _sparse_decode_tpu as kernels
from pallas_kernels._compat import Tpu, races_found, tpu
from pallas_kernels._sparse_decode import CASES, sparse_decode_attention
from tests.pallas_kernels.decode import assert_right, operands, oracle
from tests.pallas_kernels.tpu import TOPOLOGIES, compile_for, interpret, needs_libtpu, scope, vmem

ROOT = Path(tpu_decode.__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "tpu_decode.json"
CHIPS = {"v5e": Tpu(128 * 2**20, 128), "v5p": Tpu(64 * 2**20, 128, 2), "v6e": Tpu(128 * 2**20, 256)}
MANY = dataclasses.replace(CASES[1], batch=3, page=16, length=700, entries=40)


@pytest.fixture
def through(monkeypatch):
    """Give `sparse_decode_attention` the kernel in interpret mode, with a configuration."""
    monkeypatch.setattr(_op, "here", lambda: "tpu")

    def run(config=None, mode=None, **options):
        kernel = partial(kernels.attend, config=config, interpret=mode or interpret())
        monkeypatch.setitem(op.IMPLEMENTATIONS, "tpu", kernel)
        return partial(sparse_decode_attention, return_lse=True, **options)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case, through):
    args = operands(case)
    got = jax.jit(through(logit_softcap=case.softcap))(*args)
    assert not races_found()
    assert_right(got, oracle(*args, softcap=case.softcap), case)


@pytest.mark.parametrize(("order", "cores", "pages"), [("on_wait", 2, 8), ("eager", 1, 16)])
def test_many_chunks_cores_and_orders_of_copies(order, cores, pages, through):
    """Lists of several chunks beside lists of none, of which the last core has one more."""
    q, cache, ids, count, table, positions = operands(MANY)
    count = count.at[1].set(0)
    mode = interpret(dma_execution_mode=order, num_cores_or_threads=cores)
    for kept in (slice(0, 3), slice(0, 1)):
        args = *(a[kept] for a in (q,)), cache, *(a[kept] for a in (ids, count, table, positions))
        got = jax.jit(through(kernels.Config(pages, cores), mode))(*args)
        assert not races_found()
        assert_right(got, oracle(*args), MANY)


def test_an_odd_number_of_lists_on_two_cores(through):
    case = dataclasses.replace(CASES[3], batch=3)
    args = operands(case)
    got = jax.jit(through(kernels.Config(1, 2), interpret(num_cores_or_threads=2)))(*args)
    assert not races_found()
    assert_right(got, oracle(*args), case)


def test_tokens_that_see_nothing_and_empty_lists_only(through):
    q, cache, ids, count, table, positions = operands(CASES[1])
    run = jax.jit(through())
    for changed in ((count, positions.at[:, :2].set(-1)), (0 * count, positions)):
        args = q, cache, ids, changed[0], table, changed[1]
        assert_right(run(*args), oracle(*args), CASES[1])
    assert run._cache_size() == 1 and not races_found()


@pytest.mark.parametrize("shared", [True, False])
def test_under_vmap(shared, through):
    parts = [list(operands(CASES[0], seed)) for seed in (0, 1)]
    if shared:
        parts[1] = [parts[1][0], *parts[0][1:]]
    axes = (0, None, 0, 0, None, 0) if shared else 0
    stacked = [
        parts[0][i] if shared and i in (1, 4) else jnp.stack([p[i] for p in parts])
        for i in range(6)
    ]
    got = jax.jit(jax.vmap(through(), axes))(*stacked)
    assert not races_found()
    for i, args in enumerate(parts):
        assert_right([a[i] for a in got], oracle(*args), CASES[0])


def test_what_the_kernel_does_not_take_goes_to_the_xla_form(through):
    assert not kernels.supports("bfloat16", 16, 128, 8, 64)
    for options, reason in (
        (("float16", 16, 128, 8, 64), "float32 and bfloat16; got float16"),
        (("bfloat16", 16, 64, 8, 64), "multiple of 128 in the cache; got 64. With D = 64 join key"),
        (("bfloat16", 8, 128, 8, 64), "pages of 16 or more tokens of bfloat16"),
        (("float32", 48, 128, 8, 64), "power of 2 or a multiple of 128; got 48"),
        (("float32", 16, 128, 999, 64), "up to 256 queries a key head; got 999"),
        (("float32", 16, 128, 8, 10**6), "lists of up to 32768 pages; got 1000000"),
    ):
        assert reason in kernels.supports(*options)
    case = dataclasses.replace(CASES[2], planes=2)
    args = operands(case)
    assert_right(through()(*args), oracle(*args), case)
    with pytest.raises(NotImplementedError, match="With D = 64 join .* Take implementation='xla'"):
        through(implementation="tpu")(*args)


@pytest.mark.parametrize("device", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunks_fill_lanes_and_fit(dtype, device):
    item = jnp.dtype(dtype).itemsize
    for page in (16, 64, 128, 256):
        for rows in (1, 8, 256):
            for entries in (1, 7, 64, 4000):
                c = kernels.choose_config(rows, 2, page, 128, entries, dtype, device)
                assert c.pages * page % 128 == 0 and c.cores == device.cores
                assert kernels.vmem_bytes(c, rows, 2, page, 128, item) < device.vmem / 2
                chunks = -(-entries // c.pages)
                assert chunks * c.pages - entries < chunks * max(1, 128 // page)


def test_lowers_for_tpu():
    args = operands(CASES[0])
    run = jax.jit(lambda *a: op._attend("tpu", 0.1, None, True, *a))
    text = run.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


PROBLEMS = (
    tpu_decode.Problem(),
    tpu_decode.Problem(page=16, tokens=4, heads=(64, 8)),
    tpu_decode.Problem(d=64, page=16, tokens=3),
    tpu_decode.Problem(d=256, page=128, heads=(8, 8)),
)


@needs_libtpu
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_tpu_compiler_takes_it(topology, problem):
    run = lambda *a: op._attend("tpu", 0.1, 30.0, True, *a)  # noqa: E731
    compiled = compile_for(topology, run, *problem.structs)
    with scope(topology):
        device = tpu()
    rows = problem.tokens * problem.heads[0] // problem.heads[1]
    width = 2 * problem.d // problem.planes
    sizes = rows, problem.planes, problem.page, width
    config = kernels.choose_config(*sizes, problem.keys // problem.page, "bfloat16", device)
    said = kernels.vmem_bytes(config, *sizes, 2)
    assert said < device.vmem / 2
    try:
        used = vmem(compiled)
    except jax.errors.JaxRuntimeError:
        return  # jaxlib 0.10.2 cannot print every program
    assert said / 2 < used < said * 1.25


@needs_libtpu
def test_the_tpu_compiler_takes_float32_under_vmap():
    problem = tpu_decode.Problem(batch=2, keys=512)
    q, cache, *rest = (
        jax.ShapeDtypeStruct((2, *s.shape), jnp.float32 if s.dtype == jnp.bfloat16 else s.dtype)
        for s in problem.structs
    )
    run = jax.vmap(lambda *a: op._attend("tpu", 0.1, None, True, *a))
    compile_for("v6e:2x2", run, q, cache, *rest)


def test_bytes_bind_and_not_the_schedule():
    """Pages of 64 and 128 at D = 128: within 2 % of bytes / bandwidth, on TPU7x within 12 %."""
    rows = json.loads(RESULTS.read_text())["modelled"]
    asked = [row for row in rows if row["d"] == 128 and row["page"] >= 64]
    assert len(asked) == 12
    for row in asked:
        assert row["factor"] <= (1.12 if row["chip"] == "tpu7x" else 1.02)


@needs_libtpu
def test_schedules_keep_their_length(tmp_path):
    kept = json.loads(RESULTS.read_text())
    versions = {name: importlib.metadata.version(name) for name in ("libtpu", "jax")}
    if versions != {name: kept["setting"][name] for name in versions}:
        pytest.skip(f"results are of {kept['setting']}, this is {versions}")
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "experiments.tpu_decode", "--chips", "v6e", "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ)  # libtpu reads options once
    found = json.loads(out.read_text())["modelled"]
    rows = [row for row in kept["modelled"] if row["chip"] == "v6e"]
    for old, new in zip(rows, found, strict=True):
        for field in ("step", "end"):
            np.testing.assert_allclose(new[field], old[field], rtol=0.05, err_msg=str(new))
