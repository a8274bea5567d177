"""The TPU compiler accepts the kernels at the size of a transformer's feed-forward layer.

It refuses what interpret mode does not: tiles, layouts, VMEM and scalar memory overflow.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _block_sparse_gated_tpu as gated_kernels
from pallas_kernels import _block_sparse_matmul_tpu as kernels
from pallas_kernels import _block_sparse_tpu as tiles
from pallas_kernels import plan
from pallas_kernels._compat import tpu
from tests.pallas_kernels.tpu import TOPOLOGIES, compile_for, needs_libtpu, scope, vmem

pytestmark = needs_libtpu
M, K, N = 8192, 4096, 16384


def structs(m, k, n, block, live, dtype, fan_in=True):
    struct = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    (r, c), slots = (k // block, n // block), n // block * live
    places = struct(slots, dtype=jnp.int32)
    topology = jax.eval_shape(
        lambda rows, cols: plan(rows, cols, (r, c), fan_in=live if fan_in else None), places, places
    )
    return struct(m, k), struct(m, n), struct(slots, block, block), topology


def forward(x, dy, values, topology):
    return kernels.matmul(x, values, topology, False)


def dx(x, dy, values, topology):
    return kernels.matmul(dy, values, topology, True)


def dw(x, dy, values, topology):
    return kernels.gradients(x, dy, values, topology)[1]


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_vmem_is_what_the_arithmetic_says(topology, block):
    live = K // block // 8
    operands = structs(M, K, N, block, live, jnp.bfloat16)
    size = (block, block)
    slots = operands[2].shape[0]
    with scope(topology):
        here = tpu()
    for function, depth, outs in ((forward, K, N), (dx, N, K), (dw, K, N)):
        gradient = function is dw
        config = tiles.choose_config(
            M, depth, outs // block, size, slots, jnp.bfloat16, here, gradient=gradient
        )
        if gradient:
            said = tiles.gradient_bytes(config.bm, config.group, config.strip, depth, *size, 2)
        else:
            said = tiles.product_bytes(config.bm, config.group, depth, *size, 2)
        used = vmem(compile_for(topology, function, *operands))
        assert said / 2 < used <= said * 1.05 <= tiles.vmem_limit(here)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_float32_ragged_rows_and_uneven_columns(topology):
    operands = structs(1000, 512, 1024, 128, 2, jnp.float32, fan_in=False)
    compile_for(topology, lambda *a: (forward(*a), kernels.gradients(*a[:2], *a[2:])), *operands)
    operands = structs(1, 512, 1024, 256, 1, jnp.bfloat16, fan_in=False)
    compile_for(topology, lambda *a: (forward(*a), kernels.gradients(*a[:2], *a[2:])), *operands)


@pytest.mark.parametrize("shared", [True, False])
def test_vmap(shared):
    x, dy, values, topology = structs(64, 512, 512, 128, 2, jnp.bfloat16)
    stack = lambda s: jax.ShapeDtypeStruct((3, *s.shape), s.dtype)  # noqa: E731
    weight = (values, topology) if shared else jax.tree.map(stack, (values, topology))
    axes = (0, 0, None, None) if shared else 0

    def run(x, dy, values, topology):
        return forward(x, dy, values, topology), kernels.gradients(x, dy, values, topology)

    compile_for("v6e:2x2", jax.vmap(run, axes), stack(x), stack(dy), *weight)


def test_lists_as_long_as_scalar_memory():
    # 2^16 slots: 2^16 / 8 + 256 steps of 18 integers, and the order of the slots.
    operands = structs(256, 32768, 32768, 128, 256, jnp.bfloat16)
    compile_for("v6e:2x2", forward, *operands)
    compile_for("v6e:2x2", dw, *operands)


def gated(x, gate, up):
    return gated_kernels.forward(x, gate, up, jax.nn.silu)


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gated_product(topology, block):
    live, size = K // block // 8, (block, block)
    x, _, values, places = structs(M, K, N, block, live, jnp.bfloat16)
    others, other = structs(M, K, N, block, max(1, live // 2), jnp.bfloat16, fan_in=False)[2:]
    with scope(topology):
        here = tpu()
    slots = values.shape[0] + others.shape[0]
    config = tiles.choose_config(M, K, 2 * N // block, size, slots, jnp.bfloat16, here, weights=2)
    said = tiles.product_bytes(config.bm, config.group, K, *size, 2, weights=2)
    used = vmem(compile_for(topology, gated, x, (values, places), (others, other)))
    assert said / 2 < used <= said * 1.05 <= tiles.vmem_limit(here)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bias_activation_and_eight_bit_values(topology, stored):
    x, dy, values, places = structs(1000, 512, 1024, 128, 2, jnp.bfloat16, fan_in=False)
    values = jax.ShapeDtypeStruct(values.shape, stored)
    bias = jax.ShapeDtypeStruct((1024,), jnp.float32)

    def run(x, dy, values, places, bias):
        y = kernels.matmul(x, values, places, False, bias=bias, activation=jax.nn.gelu)
        return y, kernels.gradients(x, dy, values, places), gated(x, *[(values, places)] * 2)

    compile_for(topology, run, x, dy, values, places, bias)
