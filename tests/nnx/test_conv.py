"""`nnx.Conv` with a recipe: stock parameters, the arithmetic of the op, `quantize` and `plan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.recipes import get_recipe, init_state

from .helpers import assert_same, newest

IMAGES = jax.random.normal(jax.random.key(0), (3, 7, 5, 4))
OPTIONS = {"strides": (2, 1), "padding": "SAME", "kernel_dilation": (1, 2)}


class Cnn(nnx.Module):
    def __init__(self, rngs, api=nnx):
        self.conv = api.Conv(4, 6, (3, 2), **OPTIONS, rngs=rngs)
        self.depthwise = api.Conv(6, 12, (3, 3), feature_group_count=6, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.depthwise(nnx.relu(self.conv(x))))
        return self.head(x.mean((-3, -2)))


def _loss(model, x):
    return jnp.square(model(x)).sum()


def test_conv__initialised__has_the_parameters_of_stock_conv_bitwise():
    ours, stock = Cnn(nnx.Rngs(3), api=lp.nnx), Cnn(nnx.Rngs(3))
    params = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (ours, stock)]
    assert_same(*params)
    assert isinstance(ours.conv, nnx.Conv)


def test_conv__output_gradients_and_state__equal_the_functional_op_bitwise():
    recipe = "fp8_delayed"
    layer = lp.nnx.Conv(4, 6, (3, 2), **OPTIONS, recipe=recipe, rngs=nnx.Rngs(3))
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    state = {"site": init_state(get_recipe(recipe))}

    def functional(params, live, x):
        out = lp.ops.conv_general_dilated(
            x,
            params["kernel"],
            (2, 1),
            "SAME",
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            recipe=recipe,
            state=live["site"],
        )
        return jnp.square(out + params["bias"]).sum()

    ours = nnx.jit(lp.nnx.value_and_grad(_loss))
    theirs = jax.jit(lp.state.value_and_grad(functional))
    for scale in (1.0, 3.0):
        value, grads = ours(layer, scale * IMAGES)
        (expected, expected_grads), state = theirs(params, state, scale * IMAGES)
        assert_same(value, expected)
        assert_same(nnx.to_pure_dict(grads), expected_grads)
        state = lp.state.advance(state)
        (found,) = lp.nnx.scaling_state(layer).values()
        assert_same(found, state["site"])


def test_quantize__stock_conv__computes_as_our_layer_and_is_observed():
    quantized = lp.nnx.quantize(Cnn(nnx.Rngs(3)), "fp8_delayed")
    ours = Cnn(nnx.Rngs(3), api=lp.nnx)
    step = nnx.jit(lp.nnx.value_and_grad(_loss))
    for _ in range(2):
        results = [step(model, IMAGES)[0] for model in (quantized, ours)]
        np.testing.assert_array_equal(*results)
    assert sorted(newest(quantized)) == ["conv", "depthwise"]  # the head stays high
    assert all((amax > 0).all() for amax in newest(quantized).values())


def test_quantize__without_batch_axis_or_bias_and_masked__is_near_stock():
    mask = jnp.ones((3, 3, 4, 6)).at[0].set(0.0)
    layer = nnx.Conv(4, 6, (3, 3), mask=mask, use_bias=False, padding="CIRCULAR", rngs=nnx.Rngs(0))
    call = nnx.jit(lambda layer: layer(IMAGES[0]))
    expected = call(layer)
    out = call(lp.nnx.quantize(layer, "fp8_current"))
    error = jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.06  # e4m3 has a unit round-off of 2**-4, on both operands


def test_quantize__stacked_convolutions__get_state_with_the_same_leading_axis():
    create = nnx.split_rngs(splits=5)(
        nnx.vmap(lambda rngs: nnx.Conv(4, 4, (3, 3), rngs=rngs), in_axes=0, out_axes=0)
    )
    layers = lp.nnx.quantize(create(nnx.Rngs(0)), "fp8_delayed")
    (state,) = lp.nnx.scaling_state(layers).values()
    assert state["observed"].shape == (5, 3, 7)


def test_plan__convolutions__count_their_multiply_adds():
    plan = lp.nnx.plan(Cnn(nnx.Rngs(0)), "fp8_delayed", IMAGES)
    rows = {row.layer: row for row in plan.rows}
    positions = 3 * 4 * 5
    flops = {
        "conv": 2 * positions * 6 * (3 * 2 * 4),
        "depthwise": 2 * positions * 12 * (3 * 3 * 1),
        "head": 2 * 3 * 12 * 5,
    }
    for name, count in flops.items():
        assert rows[name].flop_share == pytest.approx(count / sum(flops.values()))
    assert [rows[name].recipe for name in flops] == ["fp8_delayed", "fp8_delayed", "none"]
