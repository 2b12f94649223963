import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

import lowprec_jax as lp
from linen.helpers import scaling_of, sum_of_squares
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT, init_scaling
from lowprec_jax.recipes import FP8_DELAYED


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="down")(nn.relu(nn.Dense(9, name="up")(x)))


def quantized(recipe="fp8_delayed"):
    return lp.linen.quantize(Mlp(), recipe)


def trained(model, x, steps=3):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    value_and_grad = jax.jit(lp.linen.value_and_grad(sum_of_squares(model)))
    for i in range(steps):
        _, grads = value_and_grad(variables, (i + 1) * x)
        variables = {**grads, "params": variables["params"]}
    return variables


def assert_trees_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def with_history(length):
    return dataclasses.replace(FP8_DELAYED, name=f"history_{length}", history_length=length)


def test_init_scaling__parameters_of_another_run__gets_what_init_makes_and_says_so(x, caplog):
    expected = quantized().init(jax.random.key(0), x)
    params = {"params": expected["params"]}
    got = init_scaling(quantized(), params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert_trees_equal(got, expected)
    assert "created" in caplog.text
    assert "up" in caplog.text
    assert "down" in caplog.text


def test_init_scaling__state_that_fits__is_kept_silently(x, caplog):
    variables = trained(quantized(), x)
    assert_trees_equal(init_scaling(quantized(), variables, x), variables)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("length", [2, 16, 20])
def test_init_scaling__another_history_length__keeps_the_newest(x, caplog, length):
    variables = trained(quantized(), x)
    got = init_scaling(quantized(with_history(length)), variables, x)
    old, new = scaling_of(variables)["up"], scaling_of(got)["up"]
    kept = min(length, 3)
    assert new["amax_history"].shape == (3, length)
    assert_trees_equal(new["amax_history"][:, :kept], old["amax_history"][:, :kept])
    assert not jnp.any(new["amax_history"][:, kept:])
    assert_trees_equal(new["observed"], old["observed"])
    assert ("resized" in caplog.text) == (length != 16)


def test_init_scaling__stateless_recipe__drops_state_and_says_so(x, caplog):
    got = init_scaling(quantized("fp8_current"), trained(quantized(), x), x)
    assert got.keys() == {"params"}
    assert "dropped" in caplog.text


def test_variables__bytes_round_trip__bitwise_and_usable(x):
    variables = trained(quantized(), x)
    blank = quantized().init(jax.random.key(9), x)
    restored = serialization.from_bytes(blank, serialization.to_bytes(variables))
    assert_trees_equal(restored, variables)
    f = jax.jit(lp.linen.value_and_grad(sum_of_squares(quantized())))
    assert_trees_equal(f(restored, x), f(variables, x))


def test_advance__not_when__keeps_collecting(x):
    model = quantized()
    variables = model.init(jax.random.key(0), x)
    f = lp.linen.value_and_grad(sum_of_squares(model), advance=False)
    _, once = f(variables, x)
    assert_trees_equal(lp.linen.advance(once, when=jnp.bool_(False)), once)
    _, twice = f({**once, "params": variables["params"]}, 0.5 * x)
    history = scaling_of(lp.linen.advance(twice))["up"]["amax_history"]
    assert history[0, 0] == jnp.abs(x).max()
    assert not jnp.any(history[:, 1:])


def test_advance__no_scaling_state__is_returned_as_it_is(x):
    variables = Mlp().init(jax.random.key(0), x)
    assert lp.linen.advance(variables) is variables


def test_health__range_grew_past_the_scale__saturation_names_the_operand(x):
    model = quantized()
    variables = lp.linen.calibrate(sum_of_squares(model), model.init(jax.random.key(0), x), x)
    assert lp.linen.health(variables).saturated == 0
    _, grads = lp.linen.value_and_grad(sum_of_squares(model))(variables, 100 * x)
    health = lp.linen.health(grads)
    assert health.saturated > 0.2
    assert OVERWRITE_WITH_GRADIENT not in health.worst


def test_health__no_scaling_state__is_all_zero(x):
    assert lp.linen.health(Mlp().init(jax.random.key(0), x)).saturated == 0
