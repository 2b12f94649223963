import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowprec_jax as lp
from linen.helpers import newest_amax, scaling_of, sum_of_squares
from lowprec_jax.errors import UserError
from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT, dot_general, dot_general_cls, einsum_cls


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(
            num_heads=3,
            qkv_dot_general_cls=dot_general_cls("fp8_delayed"),
            out_dot_general_cls=dot_general_cls("fp8_delayed"),
            qk_attn_weights_einsum_cls=einsum_cls("fp8_delayed"),
            attn_weights_value_einsum_cls=einsum_cls("fp8_delayed"),
        )(x)


def functional_dense(x, kernel, bias, site):
    dims = (((1,), (0,)), ((), ()))
    return lp.ops.dot_general(x, kernel, dims, recipe="fp8_delayed", state=site) + bias


def test_dot_general_cls__in_stock_dense__equals_the_functional_op_bitwise(x):
    model = nn.Dense(7, dot_general_cls=dot_general_cls("fp8_delayed"))
    variables = model.init(jax.random.key(0), x)
    loss = sum_of_squares(model)
    params, state = variables["params"], {"site": lp.recipes.init_state(lp.recipes.FP8_DELAYED)}

    def functional(p, live, x):
        return jnp.square(functional_dense(x, p["kernel"], p["bias"], live["site"])).sum()

    for _ in range(3):
        value, variables_grad = jax.jit(lp.linen.value_and_grad(loss))(variables, x)
        (expected, grads), state = jax.jit(lp.state.value_and_grad(functional))(params, state, x)
        state = lp.state.advance(state)
        variables = {**variables_grad, "params": params}
        assert value == expected
        jax.tree.map(np.testing.assert_array_equal, variables_grad["params"], grads)
        jax.tree.map(np.testing.assert_array_equal, scaling_of(variables), {"": state["site"]})


def test_dot_general_cls__in_stock_attention__observes_projections_and_products(x):
    model = Attention()
    variables = model.init(jax.random.key(0), x)
    params = variables["params"]["MultiHeadDotProductAttention_0"]
    _, following = jax.jit(lp.linen.value_and_grad(sum_of_squares(model)))(variables, x)
    seen = newest_amax(following)
    base = "MultiHeadDotProductAttention_0"
    assert len(seen) == 6
    assert all((amax > 0).all() for amax in seen.values())
    for name in ("query", "key", "value"):
        amax = seen[f"{base}/{name}"]
        assert amax[0] == jnp.abs(x).max()
        assert amax[1] == jnp.abs(params[name]["kernel"]).max()


def test_dot_general_cls__recipe_none__equals_the_stock_layer_bitwise(x):
    stock, ours = nn.Dense(7), nn.Dense(7, dot_general_cls=dot_general_cls("none"))
    variables = stock.init(jax.random.key(0), x)
    assert ours.init(jax.random.key(0), x).keys() == {"params"}
    assert (stock.apply(variables, x) == ours.apply(variables, x)).all()


def test_dot_general_cls__made_twice__modules_compare_equal():
    layers = [nn.Dense(7, dot_general_cls=dot_general_cls("fp8_current")) for _ in range(2)]
    assert layers[0] == layers[1]
    assert hash(layers[0]) == hash(layers[1])


def test_dot_general__stateless_recipe__equals_the_module(x):
    plain = nn.Dense(7, dot_general=dot_general("fp8_current"))
    module = nn.Dense(7, dot_general_cls=dot_general_cls("fp8_current"))
    variables = plain.init(jax.random.key(0), x)
    assert variables.keys() == {"params"}
    out = plain.apply(variables, x)
    assert (out == module.apply(variables, x)).all()
    assert (out != nn.Dense(7).apply(variables, x)).any()


def test_dot_general__stateful_recipe__error_names_the_other_slot():
    with pytest.raises(UserError, match=r"fp8_delayed.*dot_general_cls"):
        dot_general("fp8_delayed")


def test_apply__no_scaling_collection__error_names_init_scaling(x):
    model = nn.Dense(7, dot_general_cls=dot_general_cls("fp8_delayed"))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(UserError, match=r"DotGeneral_0.*init_scaling"):
        model.apply({"params": variables["params"]}, x)


def test_apply__evaluation__leaves_the_state_alone(x):
    model = nn.Dense(7, dot_general_cls=dot_general_cls("fp8_delayed"))
    variables = model.init(jax.random.key(0), x)
    _, after = model.apply(variables, x, mutable=[OVERWRITE_WITH_GRADIENT])
    jax.tree.map(
        np.testing.assert_array_equal,
        after,
        {OVERWRITE_WITH_GRADIENT: variables[OVERWRITE_WITH_GRADIENT]},
    )


def test_jax_grad__delayed_model__error_names_value_and_grad(x):
    model = nn.Dense(7, dot_general_cls=dot_general_cls("fp8_delayed"))
    variables = model.init(jax.random.key(0), x)
    loss = sum_of_squares(model)
    with pytest.raises(ValueError, match=r"without a sink.*lowprec_jax\.linen"):
        jax.value_and_grad(loss)(variables, x)
