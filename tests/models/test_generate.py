import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.models import generate


def history(tokens):
    """Logits of a toy causal model that depend on every token of the window so far."""
    steps = jnp.arange(1.0, tokens.shape[1] + 1)
    sums = jnp.cumsum((tokens + 1).astype(jnp.float32) * jnp.sqrt(steps), axis=1)
    return 3 * jnp.sin(sums[..., None] * jnp.arange(1.0, 12.0))


def spread(tokens):
    """Logits that depend on nothing: 0, 1, ..., 5."""
    return jnp.broadcast_to(jnp.arange(6.0), (*tokens.shape, 6))


def test_generate__prompt__is_kept_and_samples_follow():
    ids = generate(history, [1, 2, 3], 6, 8, jax.random.key(0))
    assert isinstance(ids, np.ndarray)
    assert ids.dtype == np.int32
    assert ids.shape == (9,)
    assert ids[:3].tolist() == [1, 2, 3]
    assert np.all((ids >= 0) & (ids < 11))


def test_generate__key__decides_the_sample():
    first, again, other = (
        generate(history, [1, 2], 12, 8, jax.random.key(seed), temperature=2.0)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("length", [1, 5, 9], ids=["short", "full_window", "beyond_window"])
def test_generate__greedy__equals_argmax_of_the_last_window(length):
    prompt = np.arange(length) % 11
    ids = generate(history, prompt, 7, 5, jax.random.key(0), temperature=0.0)
    expected = prompt.tolist()
    for _ in range(7):
        window = jnp.asarray([expected[-5:]])
        expected.append(int(jnp.argmax(history(window)[0, -1])))
    assert ids.tolist() == expected


def test_generate__many_tokens__traces_the_model_once():
    traces = []

    def apply(tokens):
        traces.append(tokens.shape)
        return spread(tokens)

    generate(apply, [0], 20, 4, jax.random.key(0))
    assert traces == [(1, 4)]


@pytest.mark.parametrize(("top_k", "allowed"), [(1, {5}), (2, {4, 5}), (9, {0, 1, 2, 3, 4, 5})])
def test_generate__top_k__draws_from_the_k_best_only(top_k, allowed):
    ids = generate(spread, [0], 400, 2, jax.random.key(0), temperature=5.0, top_k=top_k)
    assert set(ids[1:].tolist()) == allowed


def test_generate__temperature__frequencies_are_softmax():
    ids = generate(spread, [0], 20_000, 1, jax.random.key(0), temperature=2.0)
    expected = np.exp(np.arange(6) / 2) / np.exp(np.arange(6) / 2).sum()
    found = np.bincount(ids[1:], minlength=6) / 20_000
    # Standard error of a frequency is at most 0.0035.
    np.testing.assert_allclose(found, expected, atol=4 * 0.0035)


def test_generate__no_tokens__returns_the_prompt():
    assert generate(spread, [3, 4], 0, 2, jax.random.key(0)).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, r"prompt_ids has shape \(0,\)"),
        ({"prompt_ids": [[1]]}, r"prompt_ids has shape \(1, 1\)"),
        ({"num_tokens": -1}, "num_tokens is -1; it must be at least 0"),
        ({"context": 0}, "context is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
    ],
)
def test_generate__impossible_argument__raises(changes, message):
    arguments = {"prompt_ids": [1], "num_tokens": 1, "context": 4, **changes}
    with pytest.raises(ValueError, match=message):
        generate(spread, key=jax.random.key(0), **arguments)
