"""ptxas accepts the Hopper kernels of block-sparse attention: no spills, and shared memory fits."""

import re

import jax
import pytest

from pallas_kernels import Window
from pallas_kernels import _attention_walk_gpu as tiles
from pallas_kernels import _block_sparse_attention_backward_gpu as backward
from pallas_kernels import _block_sparse_attention_gpu as kernels
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._block_lists import BlockLists
from tests.pallas_kernels.gpu import compile_kernels, needs_ptxas

pytestmark = needs_ptxas
LAUNCH_REGISTERS = 168  # of each of 3 x 128 threads, 65,536 in all
T, UNITS = 4096, 8


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def lists(rows, width):
    of = lambda *shape: struct(1, UNITS, *shape, dtype="int32")  # noqa: E731
    return BlockLists(of(rows, width), of(rows, width), of(rows), of(rows))


def shared(folder, name):
    """Bytes that Mosaic GPU sets aside; 0 where JAX does not tell (0.10)."""
    names = re.compile(rf"{name}_\d+\.resources\.txt")
    texts = [path.read_text() for path in folder.iterdir() if names.fullmatch(path.name)]
    found = [int(n) for text in texts for n in re.findall(r"smem_scratch_bytes=(\d+)", text)]
    return max(found, default=0)


def check(folder, monkeypatch, block, g, d, everything):
    """Compile all three kernels; with `everything`, whatever makes scores harder to compute."""
    (bq, bkv), cap = block, 30.0 if everything else None
    rules = (Window(1024, 0),) if everything else ()
    form = Form(block, (T, T), rules, True, d**-0.5, cap)
    q, k = struct(1, UNITS, g, T, d), struct(1, UNITS, T, d)
    rows, cols = lists(T // bq, T // bkv), lists(T // bkv, T // bq)
    line, ids = struct(1, UNITS, g, T, dtype="float32"), None
    offset = struct(1, dtype="int32")
    if everything:
        ids = struct(1, T, dtype="int32")
    extras = Extras(offset, ids, ids)

    def all_three(q, k, v, lse, dout, delta, rows, cols, extras):
        out = kernels.forward(form, q, k, v, rows, extras)
        return out, kernels.backward(form, q, k, v, lse, dout, delta, rows, cols, extras)

    operands = (q, k, k, line, q, line, rows, cols, extras)
    binaries = compile_kernels(folder, monkeypatch, all_three, *operands)
    want = {
        "block_sparse_attention": (kernels.choose_config(block, g, d), 1, 1, 0),
        "block_sparse_attention_dq": (backward.choose_config(block, g, d), 2, 2, 0),
        "block_sparse_attention_dkv": (backward.choose_key_config(block, d), 2, 0, 2),
    }
    assert {re.sub("_mosaic.*", "", binary.name) for binary in binaries} == set(want)
    for binary in binaries:
        assert binary.registers <= LAUNCH_REGISTERS, binary
        assert binary.spilled == 0 and not binary.serialized, binary
        config, *sizes = want[binary.name]
        used, counted = shared(folder, binary.name), tiles.shared_bytes(config, d, *sizes)
        assert used <= tiles.SHARED_MEMORY
        if used:  # each array begins at a multiple of 1024
            assert counted <= used <= counted + 3 * 1024


@pytest.mark.parametrize("everything", [False, True], ids=["causal", "everything"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_blocks_of_128(d, everything, tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, (128, 128), 1, d, everything)


@pytest.mark.parametrize(
    ("block", "g", "d"),
    [((64, 64), 1, 64), ((64, 64), 1, 128), ((64, 128), 2, 128), ((128, 64), 1, 64)]
    + [((64, 64), 2, 256), ((128, 64), 1, 256)],
    ids=str,
)
def test_blocks_of_64(block, g, d, tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, block, g, d, True)


@pytest.mark.parametrize("d", [128, 256])
def test_bias(d, tmp_path, monkeypatch):
    form = Form((128, 128), (T, T), (Window(1024, 0),), True, d**-0.5, 30.0)
    q, k, blocks = struct(1, UNITS, 1, T, d), struct(1, UNITS, T, d), T // 128
    bias = struct(1, UNITS, 1, blocks, blocks, dtype="float32")
    extras = Extras(struct(1, dtype="int32"), None, None, bias, bias)
    binaries = compile_kernels(
        tmp_path,
        monkeypatch,
        lambda *a: kernels.forward(form, *a),
        *(q, k, k, lists(blocks, blocks), extras),
    )
    assert [binary.spilled for binary in binaries] == [0]
