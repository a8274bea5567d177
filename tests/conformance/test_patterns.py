"""Every pattern, by one check."""

import jax.numpy as jnp
import pytest

from jaxsparse import testing
from tests.conformance.lists import PATTERNS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_contract(pattern, dtype):
    testing.check_pattern(PATTERNS[pattern], (8, 12), dtype=jnp.dtype(dtype))
