"""Sampling from a language model with a fixed window and no key-value cache.

Imports JAX and NumPy only. Public name: `generate`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def generate(
    apply: Callable[[jax.Array], jax.Array],
    prompt_ids: Sequence[int] | np.ndarray,
    num_tokens: int,
    context: int,
    key: jax.Array,
    temperature: float = 0.8,
    top_k: int | None = None,
) -> np.ndarray:
    """Continues a prompt by sampled tokens.

    Each token is drawn from softmax(logits / temperature), after dropping all but the
    `top_k` largest logits, given the last `context` tokens. The whole loop is one compiled
    program over a padded window of fixed size; a causal model never sees the padding. It
    is compiled at each call and costs one forward pass of `context` tokens per token:
    meant for samples during training, not for serving.

    Args:
      apply: token ids int32[1, context] to logits [1, context, V], causal.
      prompt_ids: ids to continue, at least one.
      num_tokens: how many ids to add, >= 0.
      context: size of the window, in tokens.
      key: random key; equal keys give equal samples.
      temperature: >= 0; 0 takes the largest logit (the first of equals).
      top_k: how many candidates to keep (equals of the last one too); None keeps all.

    Returns:
      Prompt and continuation, int32[len(prompt_ids) + num_tokens].

    Raises:
      ValueError: the prompt is empty or not one-dimensional, or a number is out of range.

    Example:
      >>> successor = lambda tokens: jax.nn.one_hot(tokens + 1, 10)
      >>> generate(successor, [3, 4], 3, 8, jax.random.key(0), temperature=0.0).tolist()
      [3, 4, 5, 6, 7]
    """
    prompt = np.asarray(prompt_ids, np.int32)
    _check_arguments(prompt, num_tokens, context, temperature, top_k)
    total = prompt.size + num_tokens
    ids = np.zeros(max(context, total), np.int32)
    ids[: prompt.size] = prompt

    def add_token(position: jax.Array, ids: jax.Array) -> jax.Array:
        start = jnp.maximum(position - context, 0)
        window_1T = jax.lax.dynamic_slice_in_dim(ids, start, context)[None]
        logits_V = apply(window_1T)[0, position - 1 - start].astype(jnp.float32)
        token = _sample(jax.random.fold_in(key, position), logits_V, temperature, top_k)
        return ids.at[position].set(token.astype(jnp.int32))

    run = jax.jit(lambda ids: jax.lax.fori_loop(prompt.size, total, add_token, ids))
    return np.asarray(run(jnp.asarray(ids)))[:total]


def _sample(
    key: jax.Array, logits_V: jax.Array, temperature: float, top_k: int | None
) -> jax.Array:
    """Draws one id."""
    if temperature == 0:
        return jnp.argmax(logits_V)
    if top_k is not None and top_k < logits_V.size:
        smallest_kept = jax.lax.top_k(logits_V, top_k)[0][-1]
        logits_V = jnp.where(logits_V >= smallest_kept, logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V / temperature)


def _check_arguments(
    prompt: np.ndarray, num_tokens: int, context: int, temperature: float, top_k: int | None
) -> None:
    """Raises ValueError for what `generate` cannot work with."""
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError(
            f"generate: prompt_ids has shape {prompt.shape}; pass one sequence of at least one id."
        )
    for name, given, least in (
        ("num_tokens", num_tokens, 0),
        ("context", context, 1),
        ("temperature", temperature, 0),
        ("top_k", 1 if top_k is None else top_k, 1),
    ):
        if not given >= least:
            raise ValueError(f"generate: {name} is {given}; it must be at least {least}.")
