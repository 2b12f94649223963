"""The embedding with a quantized head, and heads that are layers of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowprec_jax as lp

from .helpers import WIDTH, X, assert_same

TOKENS = jnp.arange(9)


def embed(recipe="fp8_delayed", **options):
    return lp.nnx.Embed(9, WIDTH, recipe=recipe, rngs=nnx.Rngs(0), **options)


def test_embed__lookup_and_attend_without_recipe__are_those_of_the_stock_layer():
    stock = nnx.Embed(9, WIDTH, rngs=nnx.Rngs(0))
    assert_same(embed()(TOKENS), stock(TOKENS))
    np.testing.assert_allclose(embed("none").attend(X), stock.attend(X), rtol=1e-6, atol=1e-5)


def test_embed__attend__equals_the_functional_op_and_has_state():
    layer = embed()
    loss = nnx.jit(lp.nnx.value_and_grad(lambda m, x: jnp.square(m.attend(x)).sum()))
    loss(layer, X)
    table = layer.embedding[...]
    (state,) = lp.nnx.scaling_state(layer).values()
    amaxes = state["amax_history"][:2, 0]
    assert_same(amaxes, jnp.stack([jnp.abs(X).max(), jnp.abs(table).max()]))
    expected = lp.ops.einsum("bd,vd->bv", X, table, recipe="fp8_delayed", state=state)
    assert_same(layer.attend(X), expected)
    assert np.abs(expected - X @ table.T).max() > 1e-3


def test_embed__logits_dtype__is_that_of_the_result():
    layer = embed("fp8_current", dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    assert layer.attend(X).dtype == jnp.float32
    assert layer(TOKENS).dtype == jnp.bfloat16


def test_quantize__untied_head__is_quantized_by_an_explicit_rule_only():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.lm_head = nnx.Linear(WIDTH, 9, rngs=rngs)

    model = lp.nnx.quantize(Model(nnx.Rngs(0)), "fp8_delayed")
    assert model.lm_head.dot_general is jax.lax.dot_general
    rules = [("lm_head", "fp8_rowwise"), *lp.recipes.default_rules("fp8_delayed")]
    lp.nnx.quantize(model, rules)
    assert model.lm_head.dot_general.recipe.name == "fp8_rowwise"
    assert model.body.dot_general.recipe.name == "fp8_delayed"
