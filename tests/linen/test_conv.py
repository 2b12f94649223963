"""`nn.Conv` with a recipe: stock parameters, injection, `quantize`, `plan`, equality with NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lowprec_jax as lp
from linen.helpers import sum_of_squares
from lowprec_jax.errors import UserError
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT
from lowprec_jax.state import sites

IMAGES = jax.random.normal(jax.random.key(0), (3, 7, 5, 4))
OPTIONS = {"strides": (2, 1), "padding": "SAME", "kernel_dilation": (1, 2)}


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 2), **OPTIONS, name="conv")(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=6, name="depthwise")(x))
        return nn.Dense(5, name="head")(x.mean((-3, -2)))


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 2), **OPTIONS, rngs=rngs)
        self.depthwise = nnx.Conv(6, 12, (3, 3), feature_group_count=6, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.depthwise(nnx.relu(self.conv(x))))
        return self.head(x.mean((-3, -2)))


def _states(variables):
    """State of each call site by the path of its layer."""
    found = sites(variables[OVERWRITE_WITH_GRADIENT])
    return {path.split("/")[0]: dict(state) for path, state in found}


def test_conv__init__parameters_are_the_stock_layers_bitwise():
    ours, stock = (api.Conv(6, (3, 2), **OPTIONS) for api in (lp.linen, nn))
    params = [layer.init(jax.random.key(3), IMAGES)["params"] for layer in (ours, stock)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_conv__layer_slot_and_quantized_model__compute_the_same():
    layers = (
        lp.linen.Conv(6, (3, 2), **OPTIONS, recipe="fp8_rowwise"),
        nn.Conv(
            6,
            (3, 2),
            **OPTIONS,
            conv_general_dilated_cls=lp.linen.conv_general_dilated_cls("fp8_rowwise"),
        ),
        lp.linen.quantize(nn.Conv(6, (3, 2), **OPTIONS), "fp8_rowwise"),
    )
    stock = nn.Conv(6, (3, 2), **OPTIONS)
    variables = stock.init(jax.random.key(3), IMAGES)
    first, *others = [jax.jit(layer.apply)(variables, IMAGES) for layer in layers]
    for other in others:
        np.testing.assert_array_equal(first, other)
    expected = stock.apply(variables, IMAGES)
    error = jnp.linalg.norm(first - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.06  # e4m3 has a unit round-off of 2**-4, on both operands


def test_conv__linen_and_nnx__losses_gradients_and_states_equal_bitwise():
    linen = lp.linen.quantize(Cnn(), "fp8_delayed")
    twin = lp.nnx.quantize(NnxCnn(nnx.Rngs(0)), "fp8_delayed")
    variables = linen.init(jax.random.key(0), IMAGES)
    for name, params in variables["params"].items():
        getattr(twin, name).kernel.set_value(params["kernel"])
    linen_step = jax.jit(lp.linen.value_and_grad(sum_of_squares(linen)))
    nnx_step = nnx.jit(lp.nnx.value_and_grad(lambda m, x: jnp.square(m(x)).sum()))
    for i in range(2):
        value, grads = linen_step(variables, (i + 1) * IMAGES)
        expected, nnx_grads = nnx_step(twin, (i + 1) * IMAGES)
        variables = {**grads, "params": variables["params"]}
        assert value == expected
        jax.tree.map(np.testing.assert_array_equal, grads["params"], nnx.to_pure_dict(nnx_grads))
    twins = {path.split("/")[0]: s for path, s in lp.nnx.scaling_state(twin).items()}
    assert sorted(twins) == ["conv", "depthwise"]
    jax.tree.map(np.testing.assert_array_equal, _states(variables), twins)


def test_quantize__layer_with_a_convolution_of_its_own__keeps_it():
    calls = []

    def mine(*args, **kwargs):
        calls.append(args)
        return jax.lax.conv_general_dilated(*args, **kwargs)

    stock = nn.Conv(6, (3, 3), conv_general_dilated=mine)
    variables = stock.init(jax.random.key(0), IMAGES)
    expected = stock.apply(variables, IMAGES)
    out = lp.linen.quantize(stock, [(".*", "none")]).apply(variables, IMAGES)
    np.testing.assert_array_equal(out, expected)
    assert lp.linen.layers(stock, IMAGES) == []
    assert len(calls) >= 3


def test_layers_and_plan__convolutions__are_listed_with_their_work():
    found = [layer for layer in lp.linen.layers(Cnn(), IMAGES) if layer.kind == "Conv"]
    assert [layer.path for layer in found] == ["conv", "depthwise"]
    assert [layer.kernel_shape for layer in found] == [(3, 2, 4, 6), (3, 3, 1, 12)]
    plan = lp.linen.plan(Cnn(), "fp8_delayed", IMAGES)
    rows = {row.layer: row for row in plan.rows}
    flops = {"conv": 2 * 60 * 6 * 24, "depthwise": 2 * 60 * 12 * 9, "head": 2 * 3 * 12 * 5}
    assert {name: row.flop_share for name, row in rows.items()} == pytest.approx(
        {name: count / sum(flops.values()) for name, count in flops.items()}
    )


def test_conv__unknown_recipe__error_at_construction():
    with pytest.raises(UserError, match="fp8_delayd"):
        lp.linen.Conv(3, (3, 3), recipe="fp8_delayd")
