"""The TPU compiler accepts the kernels of block-sparse attention at 32,768 tokens and more.

It refuses what interpret mode does not: tiles, layouts, VMEM and scalar memory overflow.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Window
from pallas_kernels import _attention_tiles_tpu as tiles
from pallas_kernels import _block_sparse_attention_backward_tpu as kernels
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_tpu import vmem_limit
from pallas_kernels._compat import tpu
from tests.pallas_kernels.tpu import TOPOLOGIES, compile_for, needs_libtpu, scope

pytestmark = needs_libtpu


def structs(t=2**15, d=128, a=4, g=2, block=128, dtype=jnp.bfloat16, width=None, rich=False, b=1):
    """(form, operands of `run`) of a causal problem; with everything there is if `rich`."""
    struct, n = jax.ShapeDtypeStruct, t // block
    ints = lambda *s: struct(s, jnp.int32)  # noqa: E731

    def lists(width):
        return BlockLists(ints(b, a, n, width), ints(b, a, n, width), ints(b, a, n), ints(b, a, n))

    width = width or n
    form = Form((block, block), (t - 8 * rich, t - 8 * rich), (), True, d**-0.5)
    extras = Extras(ints(b))
    if rich:
        form = Form((block, block), form.shape, (Window(99, 9),), True, d**-0.5, 2.0)
        bias = struct((b, a, g, n, width), jnp.float32)
        key_bias = bias
        extras = Extras(ints(b), ints(b, t), ints(b, t), bias, key_bias)
    q, k = struct((b, a, g, t, d), dtype), struct((b, a, t, d), dtype)
    lse = struct(q.shape[:-1], jnp.float32)
    return form, (q, k, lse, lists(width), lists(width), extras)


def forward(form, q, k, lse, rows, cols, extras):
    return kernels.forward(form, q, k, k, rows, extras)


def backward(form, q, k, lse, rows, cols, extras):
    return kernels.backward(form, q, k, k, lse, q, lse, rows, cols, extras)


def vmem(compiled):
    """Bytes of VMEM of each of our kernels, by name; None where the program cannot be read."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10 and TPU7x
        return None
    found = {}
    for line in text.splitlines():
        name = re.search(r'op_name="[^"]*/(block_sparse_attention\w*)', line)
        record = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', line)
        if name and record and "tpu_custom_call" in line:
            found[name[1]] = sum(map(int, re.findall(r'"size":"(\d+)"', record[1])))
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_vmem_is_what_the_arithmetic_says(topology):
    # Short lists make few tiles, hence short programs: only one is as in use.
    form, operands = structs(width=None if topology.startswith("v6e") else 8)
    q, k, _, rows, cols, _ = operands
    with scope(topology):
        here = tpu()
        plans = [tiles.plan_rows(form, q, k, rows, here, kernel) for kernel in ("forward", "dq")]
        cut = tiles.plan_cols(form, q, k, cols, here)
    assert all(plan.resident for plan in plans)
    said = {
        "block_sparse_attention": tiles.row_bytes(plans[0], 128, 2**15, 2, "forward"),
        "block_sparse_attention_dq": tiles.row_bytes(plans[1], 128, 2**15, 2, "dq"),
        "block_sparse_attention_dkv": tiles.col_bytes(cut, 128, 2, 2),
    }

    def both(*operands):
        return forward(form, *operands), backward(form, *operands)

    used = vmem(compile_for(topology, both, *operands))
    if used is None:
        return
    assert used.keys() == said.keys()
    for name, size in used.items():
        assert said[name] / 2 < size <= said[name] * 1.05 <= vmem_limit(here), name


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("v5e:2x2", {"block": 64, "d": 64, "g": 1, "rich": True, "width": 4}),
        ("v6e:2x2", {"rich": True, "b": 2, "width": 2}),
        ("v5p:2x2x1", {"dtype": jnp.float32, "d": 256, "width": 2}),
        ("v6e:2x2", {"t": 2**18, "width": 4, "g": 4, "a": 1}),  # gathered
        ("tpu7x:2x2x1", {"block": 256, "d": 256, "g": 3, "width": 2}),
    ],
    ids=["64, all options", "128, all options", "float32", "2^18 tokens", "256"],
)
def test_forward_and_backward(topology, options):
    form, operands = structs(**options)
    compile_for(topology, lambda *a: (forward(form, *a), backward(form, *a)), *operands)


def test_block_mass():
    form, (q, k, lse, rows, _, extras) = structs(rich=True, width=2)
    compile_for("v6e:2x2", lambda *a: kernels.mass(form, *a), q, k, lse, rows, extras)


def test_lists_as_long_as_scalar_memory():
    form, (q, k, lse, rows, cols, extras) = structs(2**21, g=2, a=1, rich=True)
    assert rows.index.shape[-1] == 2**14

    def run(q, k, lse, rows, cols, extras):
        assert not tiles.supports(form, q, k, rows, cols, extras)
        plan = tiles.plan_rows(form, q, k, rows, tpu(), "dq")
        plan = dataclasses.replace(plan, members=2)
        return kernels.dq(form, q, k, k, lse, q, lse, rows, extras, plan)

    compile_for("v5e:2x2", run, q, k, lse, rows, cols, extras)
