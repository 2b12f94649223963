"""Attention with its two matmuls given, and with keys and values as a cache of few bits holds them.

Adapters give the two products as call sites with scaling state; softmax, masks and dropout are
computed in high precision.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.errors import UserError
from lowprec_jax.numerics import Quantizer
from lowprec_jax.ops.einsum import einsum
from lowprec_jax.ops.known_amax import with_known_amax
from lowprec_jax.recipes import Recipe, Role, get_recipe


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    qk: Callable,
    pv: Callable,
    kv_recipe: Recipe | str | None = None,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    on_weights: Callable[[jax.Array], Any] = lambda weights: None,
    **options: Any,
) -> jax.Array:
    """Attention of the stock Flax layers with the products ``Q K^T`` and ``P V`` given.

    Args:
      query: float [..., queries, heads, depth].
      key: float [..., keys, key heads, depth]; heads are a multiple of the key heads (GQA).
      value: float [..., keys, key heads, value depth].
      qk: ``qk(subscripts, query, key, precision=...)``, as `jnp.einsum`.
      pv: the same of weights and values, with ``amax=``, what no weight exceeds.
      kv_recipe: how keys and values are rounded, see `as_cached`.
      dropout_rng: PRNG key of the dropout of weights, as the next three in stock attention.
      dropout_rate: its rate.
      broadcast_dropout: one dropout mask for all heads and the batch.
      deterministic: no dropout.
      dtype: compute type; default: the promoted type of the inputs.
      precision: for products in high precision.
      on_weights: called with the weights, before dropout.
      **options: of `attention_weights`: ``bias``, ``mask``, ``is_causal``.

    Returns:
      The output, [..., queries, heads, value depth], of the compute type.

    Raises:
      UserError: heads that do not fit, or a `kv_recipe` without a quantizer of activations.
    """
    dtype = dtype or functools.reduce(jnp.promote_types, (query.dtype, key.dtype, value.dtype))
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    if kv_recipe is not None:
        key, value = as_cached(key, kv_recipe), as_cached(value, kv_recipe)
    query = _grouped(query / jnp.sqrt(query.shape[-1]).astype(dtype), key, value)
    scores = qk("...qhgd,...khd->...hgqk", query, key, precision=precision)
    grouped = scores.shape
    scores = scores.reshape(*grouped[:-4], -1, *grouped[-2:])
    weights = attention_weights(scores, **options)
    on_weights(weights)
    rate = 0.0 if deterministic else dropout_rate
    if rate > 0.0:
        weights = weights * _kept(weights, dropout_rng, rate, broadcast_dropout)
    weights = weights.reshape(grouped)
    out = pv("...hgqk,...khd->...qhgd", weights, value, precision=precision, amax=1 / (1 - rate))
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])


def attention_weights(
    scores: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
) -> jax.Array:
    """Softmax of scores over the keys, of their type.

    Args:
      scores: float [..., heads, queries, keys].
      bias: added to the scores, broadcastable to them.
      mask: False where nothing is seen, likewise.
      is_causal: a query sees keys up to its own position only.
      force_fp32_for_softmax: compute in f32.
    """
    if bias is not None:
        scores = scores + bias
    if is_causal:
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        mask = causal if mask is None else mask.astype(bool) & causal
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    wide = scores.astype(jnp.float32) if force_fp32_for_softmax else scores
    return jax.nn.softmax(wide).astype(scores.dtype)


def weights_einsum(
    subscripts: str,
    weights: jax.Array,
    value: jax.Array,
    *,
    amax: float,
    recipe: Recipe | str,
    state: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """`einsum` of attention weights and values, a product ``pv``.

    Weights lie between 0 and 1, and under a causal mask the first query's only weight is 1. So
    their scale is known, and delayed scaling does not take it from history: 1 maps onto the largest
    number of the format, a weight of 2**-14 is still a normal e4m3fn number, and no weight ever
    saturates, before the first step and after it.

    Args:
      subscripts: see `einsum`.
      weights: the probabilities, after dropout.
      value: the values.
      amax: what no weight exceeds: 1, or more with dropout.
      recipe: a recipe or its name.
      state: scaling state of this call site.
      **kwargs: further arguments of `einsum`.
    """
    state = with_known_amax(state, {Role.LHS: amax})
    return einsum(subscripts, weights, value, recipe=recipe, state=state, **kwargs)


def as_cached(x: jax.Array, recipe: Recipe | str) -> jax.Array:
    """Keys or values as a cache in low precision would give them back.

    They are rounded as the recipe rounds activations, with scales along the last axis: the recipe
    ``"a4"`` has four bits and a scale for each token and head, as a cache that is written token by
    token. The gradient passes unchanged (straight-through estimator).

    Args:
      x: float [..., tokens, heads, depth].
      recipe: a recipe, or its name, that quantizes activations in the forward pass: ``"a8"``,
        ``"fp8_rowwise"``, ``"mxfp8"``, ``"nvfp4"``. With one scale per tensor it is that of `x`.

    Raises:
      UserError: a recipe that leaves activations in high precision.

    Source: Kumar et al. 2024 (precision of the KV cache as a variable of its own),
      arXiv:2411.04330, section 3.1.
    """
    quantizer = kv_quantizer(recipe)
    last = x.ndim - 1
    fixed = lax.stop_gradient(x)
    rounded = quantizer(fixed, quantizer.tile(x.shape, (last,), tuple(range(last))))
    return rounded.dequantize(x.dtype) + (x - fixed)


def kv_quantizer(recipe: Recipe | str) -> Quantizer:
    """How `as_cached` rounds.

    Raises:
      UserError: a recipe that leaves activations in high precision.
    """
    recipe = get_recipe(recipe)
    fwd = recipe.gemm("fwd")
    if fwd is None or fwd.left is None:
        raise UserError(
            f"kv_recipe {recipe.name!r} quantizes no activations in the forward pass; use one that "
            "does, such as 'a4', 'a8', 'fp8_rowwise', 'mxfp8', or None for high precision."
        )
    return fwd.left


def _grouped(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Queries as [..., queries, key heads, heads of each, depth]."""
    heads, key_heads = query.shape[-2], key.shape[-2]
    if heads % key_heads or value.shape[-2] != key_heads:
        raise UserError(
            f"Attention: {heads} query, {key_heads} key and {value.shape[-2]} value heads; give as "
            "many value heads as key heads, and a multiple of them as query heads."
        )
    return query.reshape(*query.shape[:-2], key_heads, heads // key_heads, query.shape[-1])


def _kept(weights: jax.Array, rng: jax.Array | None, rate: float, broadcast: bool) -> jax.Array:
    """What dropout multiplies weights with: 0 or ``1 / (1 - rate)``."""
    if rng is None:
        raise UserError("Attention: dropout needs dropout_rng, or deterministic=True.")
    shape = weights.shape[-2:] if broadcast else weights.shape
    kept = jax.random.bernoulli(rng, 1.0 - rate, (1,) * (weights.ndim - len(shape)) + shape)
    return kept.astype(weights.dtype) / (1.0 - rate)
