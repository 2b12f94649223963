"""Attention: stock numbers without a recipe, the arithmetic of codes with one."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.ops.attention import as_cached, weights_einsum
from lowprec_jax.recipes import Role, get_recipe, init_state

from .helpers import assert_same

TOKENS, HEADS, DEPTH = 6, 4, 8
KEYS = jax.random.split(jax.random.key(0), 3)
Q = jax.random.normal(KEYS[0], (2, TOKENS, HEADS, DEPTH))
K, V = (jax.random.normal(key, (2, TOKENS, 2, DEPTH)) for key in KEYS[1:])
X = jax.random.normal(jax.random.key(1), (2, TOKENS, 12))
# Rows sum to 1 and the first is a single 1, as under a causal mask.
SCORES = 3 * Q[0, :, 0] @ Q[1, :, 0].T
P = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((TOKENS, TOKENS), bool)), SCORES, -1e9))


def layer(**options):
    return lp.nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0), **options)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_attention__recipes_none__equals_stock_attention_with_grouped_heads():
    mask = jnp.ones((2, HEADS, TOKENS, TOKENS)).at[:, :, :, 4].set(0)
    options = {"dropout_rng": jax.random.key(3), "mask": mask, "dropout_rate": 0.25}
    ours, stock = nnx.Module(), nnx.Module()
    found = lp.nnx.DotProductAttention()(Q, K, V, is_causal=True, module=ours, **options)
    expected = nnx.dot_product_attention(Q, K, V, is_causal=True, module=stock, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    weights = [holder.attention_weights[0] for holder in (ours, stock)]
    np.testing.assert_allclose(*weights, rtol=1e-6, atol=1e-7)


def test_weights_einsum__delayed__scale_of_weights_maps_one_onto_the_largest_number():
    state = dict(init_state(get_recipe("fp8_delayed")))
    stale = state["amax_history"].at[Role.LHS].set(3e4)
    state["amax_history"] = stale.at[Role.RHS].set(4.0)
    v = V[0, :, 0]
    found = weights_einsum("qk,kd->qd", P, v, amax=1.0, recipe="fp8_delayed", state=state)

    def codes(x, amax):
        scaled = np.asarray(x) * np.float32(1 / (np.float32(amax) * np.float32(1 / 448)))
        return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    expected = codes(P, 1) @ codes(v, 4) * (4 / 448**2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    exact = np.asarray(P, np.float64) @ np.asarray(v, np.float64)
    assert np.linalg.norm(found - exact) < 2**-4 * np.linalg.norm(exact)


def test_dot_product_attention__dropout__weights_never_saturate():
    core = lp.nnx.DotProductAttention(pv_recipe="fp8_delayed")

    def loss(core, q):
        return core(q, K, V, is_causal=True, dropout_rate=0.75, dropout_rng=jax.random.key(0)).sum()

    nnx.jit(lp.nnx.value_and_grad(loss))(core, Q)
    observed = lp.nnx.scaling_state(core)["pv"]["observed"][Role.LHS]
    assert observed[0] > 1  # some weights exceed 1
    assert observed[1] == 0


def test_as_cached__four_bits__rounds_each_token_and_head_and_passes_gradients():
    found, vjp = jax.vjp(lambda x: as_cached(x, "a4"), K)
    k = np.asarray(K, np.float64)
    scale = np.abs(k).max(-1, keepdims=True) / 7.5
    np.testing.assert_allclose(found, np.clip(np.round(k / scale), -7, 7) * scale, rtol=1e-6)
    assert_same(vjp(Q[:, :, :2])[0], Q[:, :, :2])
    assert_same(as_cached(found.at[0, 0].set(0.0), "a4")[0, 0], jnp.zeros((2, DEPTH)))


def test_as_cached__weights_only_recipe__is_refused():
    with pytest.raises(UserError, match=r"'w4' quantizes no activations.*'a4'"):
        layer(kv_recipe="w4")


def test_multi_head_attention__default__quantizes_the_projections_of_the_stock_layer():
    ours, stock = layer(), nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0))
    assert_same(
        nnx.to_pure_dict(nnx.state(ours, nnx.Param)), nnx.to_pure_dict(nnx.state(stock, nnx.Param))
    )
    assert ours.attention_fn is stock.attention_fn
    sites = {path.partition("/")[0] for path in lp.nnx.scaling_state(ours)}
    assert sites == {"query", "key", "value", "out"}


def test_dot_product_attention__cache_of_four_bits__equals_the_explicit_composition():
    found = lp.nnx.DotProductAttention(kv_recipe="a4")(Q[:, :, :2], K, V)
    k, v = as_cached(K, "a4"), as_cached(V, "a4")
    scores = np.einsum("bqhd,bkhd->bhqk", Q[:, :, :2], k) / np.sqrt(DEPTH)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_dot_product_attention__heads_that_do_not_fit__are_refused():
    with pytest.raises(UserError, match="4 query, 3 key and 2 value heads"):
        lp.nnx.DotProductAttention()(Q, K[:, :, [0, 0, 0]], V)
