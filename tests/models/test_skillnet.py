"""SkillNet: the mean of active modules, gradients for them alone, skills added later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.skillnet import SkillBlock
from models.transformer import Config

CONFIG = Config(width=8, heads=2, kv_heads=1, head_width=4, hidden=12)
X = jax.random.normal(jax.random.key(0), (2, 5, 8))


@pytest.fixture(scope="module")
def block():
    return SkillBlock(CONFIG, ("general", "tagging", "pairs"), rngs=nnx.Rngs(0))


def test_the_output_is_the_mean_of_the_active_modules(block):
    tasks = [("general", "pairs"), ("tagging",)]
    got = block(X, block.active(tasks))
    x = X + block.attention(block.attention_norm(X), jnp.arange(5))[0]
    rows, m = block.norm(x), block.experts
    said = [
        (jax.nn.silu(rows @ m.gate[...][e]) * (rows @ m.up[...][e])) @ m.down[...][e]
        for e in range(3)
    ]
    np.testing.assert_allclose(got[0], (x + (said[0] + said[2]) / 2)[0], atol=1e-5)
    np.testing.assert_allclose(got[1], (x + said[1])[1], atol=1e-5)


def test_a_task_moves_its_own_skills_and_what_is_shared(block):
    active = block.active([("general",), ("general", "pairs")])
    grads = nnx.grad(lambda b: jnp.sum(b(X, active) ** 2))(block)
    for kind in ("gate", "up", "down"):
        moved = np.any(grads["experts"][kind].get_value(), (1, 2))
        np.testing.assert_array_equal(moved, [True, False, True])
    assert np.any(grads["attention"]["query"]["kernel"].get_value())


def test_a_new_skill_leaves_the_others_as_they_were(block):
    tasks = [("general", "pairs"), ("tagging",)]
    for like in (None, "tagging"):
        new = block.with_skill("summary", like=like, rngs=nnx.Rngs(1))
        np.testing.assert_array_equal(new(X, new.active(tasks)), block(X, block.active(tasks)))
    copied = new(X, new.active([("summary",)] * 2))
    np.testing.assert_array_equal(copied, block(X, block.active([("tagging",)] * 2)))


def test_bad_names_are_named(block):
    with pytest.raises(ValueError, match="'taging' is no skill here. Near: tagging"):
        block.active([("taging",)])
    with pytest.raises(ValueError, match="needs a skill"):
        block.active([()])
    with pytest.raises(ValueError, match="already"):
        block.with_skill("pairs", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="like='x'"):
        block.with_skill("new", like="x", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="different names"):
        SkillBlock(CONFIG, ("a", "a"), rngs=nnx.Rngs(0))
