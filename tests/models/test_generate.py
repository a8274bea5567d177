"""Generation with cached keys and values against the full forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.generate import generate
from models.transformer import Config, Transformer

CONFIG = Config(
    vocab=31, width=16, layers=2, heads=4, kv_heads=2, head_width=8, hidden=24, context=12
)
forward = nnx.jit(lambda model, x: model(x))


@functools.cache
def made(config):
    return nnx.split(nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))())


def make(**changes):
    graph, params = made(dataclasses.replace(CONFIG, **changes))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))  # variables of its own


def tokens(batch=2, length=12):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, CONFIG.vocab)


@pytest.mark.parametrize("changes", [{}, {"tied": True, "dtype": jnp.bfloat16}])
def test_cached_generation_equals_the_full_forward(changes):
    model, prompt = make(**changes), tokens(length=4)
    out = generate(model, prompt, 8, key=jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(out[:, :4], prompt)
    apply = nnx.jit(Transformer.apply)
    logits, cache = apply(model, out[:, :5], jnp.arange(5), model.empty_cache(2, 12))
    parts = [logits]
    for i in range(5, 12):
        logits, cache = apply(model, out[:, i : i + 1], jnp.arange(i, i + 1), cache)
        parts.append(logits)
    full = np.asarray(forward(model, out))
    tolerance = 3e-2 if "dtype" in changes else 1e-5
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), full, rtol=0, atol=tolerance * np.abs(full).max()
    )
    if "dtype" not in changes:
        np.testing.assert_array_equal(out[:, 4:], full.argmax(axis=-1)[:, 3:-1])


def test_generation_goes_on_past_the_context_with_a_window():
    model, prompt = make(layers=1), tokens(length=10)
    out = generate(model, prompt, 10, key=jax.random.key(0), temperature=0)
    for end in range(13, 20):  # with one layer, a window of 12 tokens is all there is to see
        logits = np.asarray(forward(model, out[:, end - 12 : end]))[:, -1]
        np.testing.assert_array_equal(out[:, end], logits.argmax(axis=-1))
    long = generate(model, out, 3, key=jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(
        long[:, 20:], generate(model, out[:, -12:], 3, key=jax.random.key(0), temperature=0)[:, 12:]
    )


def test_sampling_follows_key_temperature_and_top_k():
    model, prompt = make(), tokens(batch=1, length=4)

    def run(seed, **options):
        return generate(model, prompt, 12, key=jax.random.key(seed), **options)

    np.testing.assert_array_equal(run(0), run(0))
    assert np.any(run(0) != run(1))
    greedy = run(0, temperature=0)
    np.testing.assert_array_equal(run(2, top_k=1), greedy)
    assert np.any(run(2, top_k=5) != greedy)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 0}, "length=0"),
        ({"temperature": -1.0}, "-1.0"),
        ({"top_k": 0}, "1..31"),
        ({"top_k": 32}, "1..31"),
        ({"prompt": jnp.zeros((1, 0), jnp.int32)}, "(1, 0)"),
    ],
)
def test_generation_says_what_is_wrong(arguments, words):
    arguments = {"prompt": tokens(), "length": 2} | arguments
    with pytest.raises(ValueError, match="generate needs") as error:
        generate(make(), key=jax.random.key(0), **arguments)
    assert words in str(error.value)
