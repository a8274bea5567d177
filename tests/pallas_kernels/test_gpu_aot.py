"""ptxas accepts the Hopper kernels at the size of a transformer's feed-forward layer.

It tells what interpret mode does not: registers, spills, and that shared memory suffices.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _block_sparse_gpu as tiles
from pallas_kernels import _block_sparse_matmul_gpu as kernels
from pallas_kernels import plan
from tests.pallas_kernels.gpu import SMS, compile_kernels, needs_ptxas

pytestmark = needs_ptxas
LAUNCH_REGISTERS = 168  # of each of 3 x 128 threads, 65,536 in all


def structs(m, k, n, block, live, dtype=jnp.bfloat16):
    (bk, bn), struct = block, lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    (r, c), slots = (k // bk, n // bn), n // bn * live
    places = struct(slots, dtype=jnp.int32)
    topology = jax.eval_shape(lambda rows, cols: plan(rows, cols, (r, c)), places, places)
    return struct(m, k), struct(m, n), struct(slots, bk, bn), topology


def check(binaries, calls):
    assert len(binaries) == calls
    for binary in binaries:
        assert binary.registers <= LAUNCH_REGISTERS, binary
        assert binary.spilled == 0 and not binary.serialized and binary.waits, binary
        assert binary.shared + tiles._BARRIERS <= tiles.SHARED_MEMORY, binary


def everything(x, dy, values, topology):
    y = kernels.matmul(x, values, topology, False)
    return y, kernels.gradients(x, dy, values, topology)


@pytest.mark.parametrize(
    "block", [(64, 64), (128, 128), (128, 256), (256, 128), (192, 192), (512, 512)], ids=str
)
def test_tiles_by_default(block, tmp_path, monkeypatch):
    operands = structs(8192, 8 * block[0], 32 * block[1], block, 4)
    binaries = compile_kernels(tmp_path, monkeypatch, everything, *operands)
    check(binaries, 3)
    gradient, *products = sorted(binaries, key=lambda binary: "gradient" not in binary.name)
    (bk, bn), slots = block, operands[2].shape[0]
    by_default = tiles.choose_gradient_config(8192, slots, block)
    assert by_default.sms == SMS
    assert gradient.wgmma == {f"m64n{by_default.cols}k16"}
    widths = {tiles.choose_config(8192, 1, o, outer).cols for o, outer in ((32, bn), (8, bk))}
    assert products[0].wgmma | products[1].wgmma == {f"m64n{cols}k16" for cols in widths}
    if gradient.shared:  # else JAX does not tell
        size = tiles.shared_bytes(by_default.rows, by_default.cols, by_default.stages)
        assert gradient.shared == size


@pytest.mark.parametrize("m", [1, 37, 1000])
def test_few_and_ragged_rows(m, tmp_path, monkeypatch):
    operands = structs(m, 512, 1024, (128, 128), 2, jnp.float16)
    check(compile_kernels(tmp_path, monkeypatch, everything, *operands), 3)


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.silu, jax.nn.softplus])
def test_bias_and_activation(activation, tmp_path, monkeypatch):
    x, dy, values, topology = structs(8192, 4096, 4096, (128, 128), 4)
    bias = jax.ShapeDtypeStruct(dy.shape[1:], jnp.float32)

    def multiply(x, values, topology, bias):
        return kernels.matmul(x, values, topology, False, bias=bias, activation=activation)

    check(compile_kernels(tmp_path, monkeypatch, multiply, x, values, topology, bias), 1)


@pytest.mark.parametrize("shared", [True, False])
def test_vmap(shared, tmp_path, monkeypatch):
    m = 64 if shared else 128  # the gradient of one shape is compiled once, and leaves files once
    x, dy, values, topology = structs(m, 512, 512, (128, 128), 2)
    stack = lambda s: jax.ShapeDtypeStruct((3, *s.shape), s.dtype)  # noqa: E731
    weight = (values, topology) if shared else jax.tree.map(stack, (values, topology))
    mapped = jax.vmap(everything, (0, 0, None, None) if shared else 0)
    check(compile_kernels(tmp_path, monkeypatch, mapped, stack(x), stack(dy), *weight), 3)
