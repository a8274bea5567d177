"""What every test shares: 8 host devices, hypothesis profiles, seeds, strict dtype promotion."""

import gc
import os
from pathlib import Path

# XLA reads its flags when a process (each xdist worker, each subprocess) first uses a device.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# A deadline would measure compilation. In CI the same examples every time; at a desk new ones.
hypothesis.settings.register_profile("desk", deadline=None, max_examples=30)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=15, derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture(autouse=True)
def _numpy_seed():
    """No test depends on the order of the tests."""
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """A compiled program keeps memory mapped, and Linux allows 65,530 maps: then XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    """A fixed PRNG key."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def devices():
    """The 8 host devices, for meshes."""
    found = jax.devices("cpu")
    if len(found) < 8:
        pytest.fail(f"tests need 8 host devices, got {len(found)}; {os.environ['XLA_FLAGS']=}")
    return found[:8]


@pytest.fixture
def strict_promotion():
    """Mixed dtypes raise for the whole test: `@pytest.mark.usefixtures("strict_promotion")`.

    Optax itself fails under it, so a test that also calls Optax writes
    `with jax.numpy_dtype_promotion("strict"):` around the calls of ours alone.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield
