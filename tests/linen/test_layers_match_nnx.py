"""Embedding, gated MLP and LoRA in Linen: the numbers and the state of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lowprec_jax as lp
from linen.helpers import scaling_of

X = jax.random.normal(jax.random.key(1), (8, 12))
TOKENS = jnp.arange(5)


class TiedLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = lp.linen.Embed(5, 12, recipe="fp8_delayed", name="embed")
        return embed.attend(x + embed(TOKENS).sum(0))


class TiedNnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = lp.nnx.Embed(5, 12, recipe="fp8_delayed", rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(x + self.embed(TOKENS).sum(0))


def both_gated(**options):
    linen = lp.linen.GatedMlp(12, 16, **options)
    return linen, lp.nnx.GatedMlp(12, 16, rngs=nnx.Rngs(0), **options)


PAIRS = {
    "embed": lambda: (TiedLinen(), TiedNnx(nnx.Rngs(0))),
    "smooth": lambda: both_gated(smooth=True),
    "apart": lambda: both_gated(fused=False, recipe="fp8_current"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_layer__two_steps__losses_gradients_and_states_equal_those_of_nnx_bitwise(name):
    linen, twin = PAIRS[name]()
    variables = linen.init(jax.random.key(0), X)
    nnx.update(twin, nnx.State(variables["params"]))
    linen_step = jax.jit(lp.linen.value_and_grad(lambda v, x: jnp.square(linen.apply(v, x)).sum()))
    nnx_step = nnx.jit(lp.nnx.value_and_grad(lambda m, x: jnp.square(m(x)).sum()))
    for i in range(2):
        value, grads = linen_step(variables, (i + 1) * X)
        expected, nnx_grads = nnx_step(twin, (i + 1) * X)
        variables = {**grads, "params": variables["params"]}
        assert value == expected
        jax.tree.map(np.testing.assert_array_equal, grads["params"], nnx.to_pure_dict(nnx_grads))
    states = list(lp.nnx.scaling_state(twin).values())
    found = list(scaling_of(variables).values()) if states else []
    assert len(found) == len(states) == {"embed": 1, "smooth": 2, "apart": 0}[name]
    jax.tree.map(np.testing.assert_array_equal, sorted_by_amax(found), sorted_by_amax(states))


def sorted_by_amax(states):
    """In an order that does not depend on names."""
    return sorted(map(dict, states), key=lambda state: tuple(state["amax_history"][:, 0]))


def test_smooth_dot_general_cls__in_a_stock_layer__is_that_of_nnx():
    dense = nn.Dense(5, dot_general_cls=lp.linen.smooth_dot_general_cls("fp8_current"))
    variables = dense.init(jax.random.key(0), X)
    twin = nnx.Linear(12, 5, dot_general=lp.nnx.SmoothDotGeneral("fp8_current"), rngs=nnx.Rngs(0))
    nnx.update(twin, nnx.State(variables["params"]))
    np.testing.assert_array_equal(jax.jit(dense.apply)(variables, X), nnx.jit(lambda m: m(X))(twin))


def test_quantize__untied_head__is_quantized_by_an_explicit_rule_only():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(9, name="lm_head")(nn.Dense(12, name="body")(x))

    rules = [("lm_head", "fp8_delayed"), *lp.recipes.default_rules("none")]
    for given, quantized in (("fp8_delayed", {"body"}), (rules, {"lm_head"})):
        shapes = jax.eval_shape(lp.linen.quantize(Model(), given).init, jax.random.key(0), X)
        assert set(shapes[lp.linen.OVERWRITE_WITH_GRADIENT]) == quantized


def test_lora_dense__from_a_dense_layer__equals_nnx_and_trains_the_adapters_only():
    dense = nn.Dense(6).init(jax.random.key(0), X)["params"]
    variables = lp.linen.lora_from_dense(dense, 2, rng=jax.random.key(1))
    layer = lp.linen.LoRADense(6, 2)
    stock = nnx.Linear(12, 6, rngs=nnx.Rngs(0))
    nnx.update(stock, nnx.State(dense))
    twin = lp.nnx.LoRALinear.from_linear(stock, 2, rngs=nnx.Rngs(0))
    twin.lora_a[...] = variables["params"]["lora_a"]
    frozen = {"frozen": variables["frozen"]}

    def loss(variables, frozen, x):
        return jnp.square(layer.apply({**variables, **frozen}, x) - 1).sum()

    value, grads = jax.jit(lp.linen.value_and_grad(loss))(
        {"params": variables["params"]}, frozen, X
    )
    expected, nnx_grads = nnx.jit(lp.nnx.value_and_grad(lambda m, x: jnp.square(m(x) - 1).sum()))(
        twin, X
    )
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, grads["params"], nnx.to_pure_dict(nnx_grads))
    assert np.abs(grads["params"]["lora_b"]).max() > 0
    made = layer.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
