import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowprec_jax as lp
from linen.helpers import newest_amax, sum_of_squares
from lowprec_jax.errors import UserError

PAIRS = {
    "dense": (lp.linen.Dense, nn.Dense, {"features": 7}),
    "dense_no_bias": (lp.linen.Dense, nn.Dense, {"features": 7, "use_bias": False}),
    "dense_bf16": (lp.linen.Dense, nn.Dense, {"features": 7, "dtype": jnp.bfloat16}),
    "dense_general": (lp.linen.DenseGeneral, nn.DenseGeneral, {"features": (3, 5)}),
    "einsum": (lp.linen.Einsum, nn.Einsum, {"shape": (12, 3, 5), "einsum_str": "bi,ino->bno"}),
    "einsum_ellipsis": (
        lp.linen.Einsum,
        nn.Einsum,
        {"shape": (12, 5), "einsum_str": "...i,io->...o"},
    ),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


@every_pair
def test_layers__init__parameters_are_the_stock_layers_bitwise(x, name):
    ours, stock, fields = PAIRS[name]
    expected = stock(**fields).init(jax.random.key(3), x)["params"]
    got = ours(**fields, recipe="fp8_delayed").init(jax.random.key(3), x)["params"]
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@every_pair
def test_layers__recipe_none__output_and_gradients_are_the_stock_layers_bitwise(x, name):
    ours, stock, fields = PAIRS[name]
    variables = stock(**fields).init(jax.random.key(3), x)
    grads = [
        jax.value_and_grad(sum_of_squares(model))(variables, x)
        for model in (stock(**fields), ours(**fields, recipe="none"))
    ]
    jax.tree.map(np.testing.assert_array_equal, *grads)


@every_pair
def test_layers__fp8_delayed__near_the_stock_layer_and_observed_exactly(x, name):
    ours, stock, fields = PAIRS[name]
    model = ours(**fields, recipe="fp8_delayed")
    loss = sum_of_squares(model)
    variables = lp.linen.calibrate(loss, model.init(jax.random.key(3), x), x)
    expected = stock(**fields).apply({"params": variables["params"]}, x)
    got = model.apply(variables, x)
    error = jnp.linalg.norm(jnp.float32(got - expected)) / jnp.linalg.norm(jnp.float32(expected))
    assert got.dtype == expected.dtype
    assert 0 < error < 0.06  # e4m3 has a unit round-off of 2**-4, on both operands
    (amax,) = newest_amax(variables).values()
    dtype = fields.get("dtype", jnp.float32)
    assert amax[0] == jnp.abs(x.astype(dtype)).max().astype(jnp.float32)
    kernel = variables["params"]["kernel"].astype(dtype)
    assert amax[1] == jnp.abs(kernel).max().astype(jnp.float32)


def test_einsum__fp8_delayed__equals_dense_bitwise(x):
    dense = lp.linen.Dense(5, recipe="fp8_delayed")
    einsum = lp.linen.Einsum((12, 5), "bi,io->bo", recipe="fp8_delayed")
    params = dense.init(jax.random.key(3), x)["params"]
    results = []
    for model in (dense, einsum):
        variables = lp.linen.init_scaling(model, {"params": params}, x)
        variables = lp.linen.calibrate(sum_of_squares(model), variables, x)
        value, grads = lp.linen.value_and_grad(sum_of_squares(model))(variables, x)
        results.append((value, grads["params"], list(newest_amax(grads).values())))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_einsum__equation_without_output__error(x):
    layer = lp.linen.Einsum((12, 5), "bi,io", recipe="fp8_delayed")
    with pytest.raises(ValueError, match="bi,io"):
        layer.init(jax.random.key(0), x)


def test_dense__unknown_recipe__error_at_construction():
    with pytest.raises(UserError, match="fp8_delayd"):
        lp.linen.Dense(3, recipe="fp8_delayd")


def test_dense__clone_with_another_recipe__takes_it(x):
    layer = lp.linen.Dense(7, recipe="fp8_delayed").clone(recipe="none")
    assert layer.init(jax.random.key(0), x).keys() == {"params"}
