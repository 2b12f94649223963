"""Call sites: injection into stock layers, what is state and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowprec_jax as lp

from .helpers import HIDDEN, WIDTH, C, Mlp, X, amaxes, assert_same, kernel_of, linear, linear_loss

step = nnx.jit(lp.nnx.value_and_grad(linear_loss))


def test_dot_general__in_stock_linear__equals_our_layer_bitwise():
    op = lp.nnx.DotGeneral("fp8_delayed")
    stock = nnx.Linear(WIDTH, HIDDEN, use_bias=False, dot_general=op, rngs=nnx.Rngs(0))
    ours = linear()
    for _ in range(2):
        assert_same(step(stock, X, C), step(ours, X, C))
    assert_same(lp.nnx.scaling_state(stock), lp.nnx.scaling_state(ours))


def test_dot_general__in_stock_linear_general__observes_exactly():
    op = lp.nnx.DotGeneral("fp8_delayed")
    layer = nnx.LinearGeneral(WIDTH, HIDDEN, use_bias=False, dot_general=op, rngs=nnx.Rngs(0))
    step(layer, X, C)
    newest = op.get_scaling()["amax_history"][:, 0]
    np.testing.assert_array_equal(newest, amaxes(X, kernel_of(layer), C))


def test_einsum_op__in_stock_einsum__observes_exactly():
    op = lp.nnx.EinsumOp("fp8_delayed")
    layer = nnx.Einsum("bi,io->bo", (WIDTH, HIDDEN), einsum_op=op, rngs=nnx.Rngs(0))
    step(layer, X, C)
    newest = op.get_scaling()["amax_history"][:, 0]
    np.testing.assert_array_equal(newest, amaxes(X, kernel_of(layer), C))


def test_site__shared_recipe_object__keeps_state_apart():
    a, b = lp.nnx.DotGeneral("fp8_delayed"), lp.nnx.DotGeneral("fp8_delayed")
    assert a.recipe is b.recipe
    assert a.scaling is not b.scaling


def test_site__stateless_recipe__has_no_variable_and_no_site():
    layer = linear("fp8_current")
    assert jax.tree.leaves(nnx.state(layer, lp.nnx.Scaling)) == []
    assert list(lp.nnx.iter_sites(layer)) == []


def test_optimizer__of_a_quantized_model__never_holds_scaling_state():
    model, stock = lp.nnx.quantize(Mlp(nnx.Rngs(0)), "fp8_delayed"), Mlp(nnx.Rngs(0))
    ours, theirs = (nnx.Optimizer(m, optax.adamw(1e-3), wrt=nnx.Param) for m in (model, stock))
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    assert nnx.state(ours, lp.nnx.Scaling) == nnx.State({})
    assert len(jax.tree.leaves(nnx.state(model, lp.nnx.Scaling))) == 2 * 3


def test_iter_sites__two_models__have_paths_of_their_own():
    """Paths of two models with the same layers were equal: scaling_state lost the first model."""
    first, second = linear(), linear(seed=1)
    step(first, X, C)
    states = lp.nnx.scaling_state(first, second)
    assert list(states) == ["0/dot_general", "1/dot_general"]
    assert states["0/dot_general"]["observed"][:, lp.recipes.Record.AGE].sum() == 0
    assert states["0/dot_general"]["observed"].sum() > 0
    assert states["1/dot_general"]["observed"].sum() == 0


def test_health__after_a_step__names_the_worst_operand():
    model = lp.nnx.quantize(Mlp(nnx.Rngs(0)), "fp8_delayed")
    nnx.jit(lp.nnx.value_and_grad(lambda m, x: m(x).sum()))(model, X)
    health = lp.nnx.health(model)
    assert health.nonfinite == 0
    layer, role = health.worst.split(" ")
    assert layer in lp.nnx.scaling_state(model)
    assert role in ("lhs", "rhs", "output_grad")


def test_site__inside_an_evaluation__observes_nothing():
    layer = linear()
    step(layer, X, C)
    before = lp.nnx.scaling_state(layer)
    nnx.jit(lambda layer, x: layer(x))(layer, 100 * X)
    layer(100 * X)
    assert_same(lp.nnx.scaling_state(layer), before)


def test_site__stock_value_and_grad__raises_naming_the_fix():
    with pytest.raises(ValueError, match=r"fp8_delayed.*value_and_grad of lowprec_jax\.nnx"):
        nnx.value_and_grad(linear_loss)(linear(), X, C)


def test_cond__with_state_as_operand__observes_the_branch_that_runs_only():
    dims = (((1,), (0,)), ((), ()))
    first, second = linear(), linear(seed=1)

    def branch(i):
        def run(x, layers):
            kernel, state = layers[i]
            return lp.ops.dot_general(x, kernel, dims, recipe="fp8_delayed", state=state)

        return run

    def loss(models, pred, x, c):
        layers = [(m.kernel[...], m.dot_general.state) for m in models]
        return (lp.ops.cond(pred, branch(0), branch(1), x, layers) * c).sum()

    conditional = nnx.jit(lp.nnx.value_and_grad(loss))
    untouched = lp.nnx.scaling_state(second)
    conditional(nnx.List([first, second]), jnp.array(True), X, C)
    expected = linear()
    step(expected, X, C)
    assert_same(lp.nnx.scaling_state(first), lp.nnx.scaling_state(expected))
    assert_same(lp.nnx.scaling_state(second), untouched)
    conditional(nnx.List([first, second]), jnp.array(False), X, C)
    assert_same(lp.nnx.scaling_state(first), lp.nnx.scaling_state(expected))
    assert lp.nnx.scaling_state(second)["dot_general"]["amax_history"][2, 0] == amaxes(C)[0]


def test_scaling__pure_dict_round_trip__state_is_restored_bitwise():
    trained, fresh = linear(), linear()
    step(trained, X, C)
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(trained)))
    nnx.update(fresh, state)
    assert_same(lp.nnx.scaling_state(fresh), lp.nnx.scaling_state(trained))
