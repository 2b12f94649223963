"""The layers: stock parameters, and the arithmetic of `lowprec_jax.ops`, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import get_recipe, init_state

from .helpers import BATCH, WIDTH, X, assert_same

IMAGES = X.reshape(BATCH, 3, 4)
HEADS = jax.random.normal(jax.random.key(5), (3, BATCH, 4))
# Name -> (layer of `nnx` or `lp.nnx`, input, subscripts of the product).
LAYERS = {
    "linear": (lambda api, **kw: api.Linear(WIDTH, 20, **kw), X, "bi,io->bo"),
    "linear_general": (
        lambda api, **kw: api.LinearGeneral((3, 4), (5, 2), axis=(-2, -1), **kw),
        IMAGES,
        "bhi,hiop->bop",
    ),
    "linear_general_batched": (
        lambda api, **kw: api.LinearGeneral(4, 7, axis=-1, batch_axis={0: 3}, **kw),
        HEADS,
        "hbi,hio->hbo",
    ),
    "einsum": (lambda api, **kw: api.Einsum("bhi,hio->bo", (3, 4, 7), (7,), **kw), IMAGES, None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers__initialised__have_the_parameters_of_stock_layers_bitwise(name):
    make = LAYERS[name][0]
    ours, stock = make(lp.nnx, rngs=nnx.Rngs(3)), make(nnx, rngs=nnx.Rngs(3))
    assert_same(
        nnx.to_pure_dict(nnx.state(ours, nnx.Param)), nnx.to_pure_dict(nnx.state(stock, nnx.Param))
    )
    assert len(jax.tree.leaves(nnx.state(ours, nnx.Param))) == 2
    assert isinstance(ours, type(stock))


@pytest.mark.parametrize("recipe", ["fp8_delayed", "fp8_current", "none"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers__output_gradients_and_state__equal_the_functional_op_bitwise(name, recipe):
    make, x, subscripts = LAYERS[name]
    layer = make(lp.nnx, rngs=nnx.Rngs(3), recipe=recipe)
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...] + 1}
    layer.bias[...] = params["bias"]
    site = init_state(get_recipe(recipe))

    def functional(params, live, x):
        out = lp.ops.einsum(
            subscripts or "bhi,hio->bo", x, params["kernel"], recipe=recipe, state=live["site"]
        )
        bias = params["bias"]
        if name == "linear_general_batched":
            bias = bias[:, None]
        return (jnp.sin(out + bias) * 3).sum()

    ours = nnx.jit(lp.nnx.value_and_grad(lambda layer, x: (jnp.sin(layer(x)) * 3).sum()))
    theirs = jax.jit(lp.state.value_and_grad(functional))
    state = {"site": site}
    for scale in (1.0, 3.0):
        value, grads = ours(layer, scale * x)
        (expected, expected_grads), state = theirs(params, state, scale * x)
        assert_same(value, expected)
        assert_same(nnx.to_pure_dict(grads), expected_grads)
        state = lp.state.advance(state)
        found = lp.nnx.scaling_state(layer)
        assert_same(next(iter(found.values()), {}), state["site"])


def test_layers__delayed__round_the_product_once_scales_are_known():
    """Guards the comparison above against a layer that never quantizes."""
    layer = lp.nnx.Linear(WIDTH, 20, rngs=nnx.Rngs(0))
    stock = nnx.Linear(WIDTH, 20, rngs=nnx.Rngs(0))
    lp.nnx.calibrate(lambda layer, x: layer(x).sum(), layer, X)
    error = np.abs(layer(X) - stock(X)).max() / np.abs(stock(X)).max()
    assert 1e-3 < error < 0.1


def test_layers__dtype_and_precision_arguments__are_those_of_the_stock_layers():
    layer = lp.nnx.Linear(
        WIDTH, 20, dtype=jnp.bfloat16, param_dtype=jnp.float32, use_bias=False, rngs=nnx.Rngs(0)
    )
    assert layer(X).dtype == jnp.bfloat16
    assert layer.bias is None


def test_layers__unknown_recipe__raises_naming_the_nearest():
    with pytest.raises(UserError, match=r"fp8_delayd.*Did you mean 'fp8_delayed'"):
        lp.nnx.Linear(WIDTH, 20, recipe="fp8_delayd", rngs=nnx.Rngs(0))
