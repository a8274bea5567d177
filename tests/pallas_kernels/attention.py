"""Problems from the cases of `block_sparse_attention`, and the dense answers with their gradients.

    problem = problem_of(case)
    assert_like_reference(attend, problem, case.tolerance)

where `attend(q=, k=, v=, block_mask=, **options)` gives (out, lse, mass), as `attention("xla")`
does.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.check_kernels import error
from pallas_kernels import BlockMask, Window, block_sparse_attention
from pallas_kernels._attention_cases import reference

__all__ = ["Problem", "assert_like_reference", "attention", "both", "error", "problem_of"]


class Problem(NamedTuple):
    """What attention is called with.

    Attributes:
        arrays: Those that have gradients: q, k, v and perhaps bias_per_block.
        mask: The block mask.
        traced: Arrays without a gradient: q_offset and segment_ids, if the case has them.
        static: causal, logit_softcap.
    """

    arrays: dict[str, jax.Array]
    mask: BlockMask
    traced: dict[str, jax.Array]
    static: dict[str, Any]


def problem_of(case, seed=0):
    """Random operands of a case."""
    rng = np.random.default_rng(seed)
    (t, s), (h, h_kv), b = case.shape, case.heads, case.batch
    shapes = {"q": (b, t, h, case.d), "k": (b, s, h_kv, case.d), "v": (b, s, h_kv, case.d)}
    arrays = {n: jnp.asarray(rng.standard_normal(x), case.dtype) for n, x in shapes.items()}
    rows, cols = -(-t // case.block[0]), -(-s // case.block[1])
    listed = rng.random((b if case.batched else 1, case.mask_heads, rows, cols)) < case.density
    if "empty rows" in case.options:
        listed[:, :, 1] = False
        listed[:, 0, :, 0] = False
    rule = Window(150, 20) if "window" in case.options else None
    mask = BlockMask.from_dense(listed, case.block, shape=case.shape, rule=rule)
    traced, static = {}, {}
    if "causal" in case.options:
        static["causal"] = True
    if "softcap" in case.options:
        static["logit_softcap"] = 2.0
    if "offset" in case.options:
        traced["q_offset"] = jnp.asarray(s - t)
    if "segments" in case.options:
        traced["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 4, (b, t)), 1))
    if "bias" in case.options:
        arrays["bias_per_block"] = jnp.asarray(rng.standard_normal((1, h, rows, cols)), jnp.float32)
    return Problem(arrays, mask, traced, static)


@cache
def attention(implementation=None):
    """`block_sparse_attention` that returns (out, lse, mass)."""
    return partial(
        block_sparse_attention,
        return_lse=True,
        return_block_mass=True,
        implementation=implementation,
    )


def both(attend, problem, weights=(1.0, 1.0, 1.0)):
    """(out, lse, mass) and the gradients of `problem.arrays` through all three, as one jitted call.

    Args:
        attend: Gives (out, lse, mass); hashable.
        problem: A `Problem`.
        weights: Of out, lse and mass in the loss; 0 leaves one out altogether, and gives None.
    """
    return _both(attend, tuple(problem.static.items()), weights)(*problem[:3])


@cache  # problems of one size share what is compiled
def _both(attend, static, weights):
    def loss(arrays, mask, traced):
        results = attend(block_mask=mask, **arrays, **traced, **dict(static))
        total = 0.0
        for number, (weight, x) in enumerate(zip(weights, results, strict=True)):
            if weight:
                random = jnp.sin(number + 7.1 * jnp.arange(x.size)).reshape(x.shape)
                # A query that sees nothing has no gradient through its lse, which is -inf.
                total += weight * jnp.vdot(random, jnp.where(x == -jnp.inf, 0, x.astype("float32")))
        return total, [x if weight else None for weight, x in zip(weights, results, strict=True)]

    def run(arrays, mask, traced):
        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(arrays, mask, traced)
        return results, gradients

    return jax.jit(run)


def assert_like_reference(attend, problem, tolerance, weights=(1.0, 1.0, 1.0)):
    """Results and gradients of `attend` are those of the dense reference."""
    results, gradients = both(attend, problem, weights)
    want_results, want_gradients = both(reference, problem, weights)
    got = dict(zip(("out", "lse", "mass"), results, strict=True)) | gradients
    want = dict(zip(("out", "lse", "mass"), want_results, strict=True)) | want_gradients
    for name, expected in want.items():
        if expected is None:
            continue
        a, b = np.asarray(got[name], np.float32), np.asarray(expected, np.float32)
        assert got[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(a == -np.inf, b == -np.inf, err_msg=name)
        a, b = (np.where(x == -np.inf, 0, x) for x in (a, b))
        e = error(a, b)
        assert e <= tolerance, f"{name}: error {e:.1e}, at most {tolerance:.1e}"
