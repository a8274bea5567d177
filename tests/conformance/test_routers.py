"""Every router gives routings that the layer of experts can use, whatever it is fed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import moe
from tests.conformance.lists import ROUTERS

T, E = 48, 8
EVIDENCE = {"key": jax.random.key(7), "tokens": jnp.arange(T) % 13, "given": jnp.arange(T) % E}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_routing_is_sound(name):
    router, most, sums_to_one, causal = ROUTERS[name]
    logits, state = jax.random.normal(jax.random.key(0), (T, E)), router.init(E)

    @jax.jit
    def run(logits, state):
        def weigh(logits):
            routing = router.route(logits, state, **EVIDENCE)
            return routing.weights.sum() + routing.aux, routing

        (_, routing), slope = jax.value_and_grad(weigh, has_aux=True)(logits)
        return routing, slope, router.update(state, moe.statistics(routing, E))

    routing, slope, new = run(logits, state)
    weights, experts = np.asarray(routing.weights), np.asarray(routing.experts)
    assert weights.shape == experts.shape == (T, most)
    assert weights.dtype == np.float32 and experts.dtype == np.int32
    assert routing.aux.shape == () and routing.aux.dtype == jnp.float32
    used = experts < E
    assert experts.min() >= 0 and experts.max() <= E and weights.min() >= 0
    assert used.any() and not weights[~used].any()
    for row, live in zip(experts, used, strict=True):
        assert len(set(row[live])) == live.sum()  # no expert twice
    if sums_to_one:
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert np.all(np.isfinite(slope))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    again, _, _ = run(logits, new)  # a state of the same shapes: nothing is compiled anew
    assert run._cache_size() == 1 and again.weights.shape == weights.shape

    later, _, _ = run(
        logits.at[T // 2 :].set(jax.random.normal(jax.random.key(1), (T // 2, E))), state
    )
    same = np.array_equal(np.asarray(later.experts)[: T // 2], experts[: T // 2])
    assert same == causal
