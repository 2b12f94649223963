"""Attention in Linen: the numbers and the state of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lowprec_jax as lp
from linen.helpers import scaling_of
from lowprec_jax.errors import UserError

X = jax.random.normal(jax.random.key(1), (2, 4, 8))
HEADS = X.reshape(2, 4, 2, 4)


@pytest.mark.nightly
def test_multi_head_attention__all_recipes_given__equals_nnx_bitwise():
    recipes = {"recipe": "none", "qk_recipe": "fp8_delayed", "pv_recipe": "fp8_delayed"}
    linen = lp.linen.MultiHeadAttention(2, kv_recipe="a8", **recipes)
    twin = lp.nnx.MultiHeadAttention(
        2, 8, kv_recipe="a8", decode=False, rngs=nnx.Rngs(0), **recipes
    )
    mask = nn.make_causal_mask(X[..., 0])
    variables = linen.init(jax.random.key(0), X)
    nnx.update(twin, nnx.State(variables["params"]))
    linen_step = jax.jit(
        lp.linen.value_and_grad(lambda v, x: jnp.square(linen.apply(v, x, mask=mask)).sum())
    )
    nnx_step = nnx.jit(lp.nnx.value_and_grad(lambda m, x: jnp.square(m(x, mask=mask)).sum()))
    for i in range(2):  # the second step has scales from history
        value, grads = linen_step(variables, (i + 1) * X)
        expected, nnx_grads = nnx_step(twin, (i + 1) * X)
        variables = {**grads, "params": variables["params"]}
        assert value == expected
        jax.tree.map(np.testing.assert_array_equal, grads["params"], nnx.to_pure_dict(nnx_grads))
    states, found = lp.nnx.scaling_state(twin), scaling_of(variables)
    assert states.keys() == found.keys() == {"attention_fn/qk", "attention_fn/pv"}
    jax.tree.map(np.testing.assert_array_equal, states, {k: dict(v) for k, v in found.items()})
    assert (states["attention_fn/pv"]["amax_history"].max(-1) > 0).all()


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8"])
def test_dot_product_attention__recipe_without_state__equals_nnx_and_rounds(recipe):
    linen = lp.linen.DotProductAttention(recipe, recipe, recipe)
    twin = lp.nnx.DotProductAttention(qk_recipe=recipe, pv_recipe=recipe, kv_recipe=recipe)
    found = jax.jit(lambda x: linen.apply({}, x, x, x))(HEADS)
    np.testing.assert_array_equal(found, jax.jit(lambda x: twin(x, x, x))(HEADS))
    exact = nn.dot_product_attention(HEADS, HEADS, HEADS)
    assert 1e-3 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.1


def test_multi_head_attention__no_recipe_for_the_core__is_the_stock_layer():
    assert lp.linen.MultiHeadAttention(2).attention_fn is nn.dot_product_attention
    variables = lp.linen.MultiHeadAttention(2, recipe="none").init(jax.random.key(0), X)
    stock = nn.MultiHeadDotProductAttention(2)
    jax.tree.map(np.testing.assert_array_equal, variables, stock.init(jax.random.key(0), X))
    with pytest.raises(UserError, match="kv_recipe 'w4'"):
        lp.linen.MultiHeadAttention(2, kv_recipe="w4")
