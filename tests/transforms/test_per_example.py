"""Gradients of every example by itself, and the refusal that leads there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transforms.adapters import ADAPTERS
from transforms.helpers import BATCH, C, X, chain, exact

import lowprec_jax as lp
from lowprec_jax.errors import UserError
from lowprec_jax.recipes import FP8_DELAYED, Column

RECIPE = exact(FP8_DELAYED)


@pytest.mark.parametrize("front_end", ADAPTERS)
def test_per_example__exact_data__every_gradient_is_that_of_its_example(front_end):
    adapter = ADAPTERS[front_end](RECIPE)
    carrier = adapter.start(stacked=False)
    step = jax.jit(adapter.step(adapter.chain, per_example=True))
    values, grads, _ = step(carrier, jnp.asarray(X), jnp.asarray(C))
    expected = [chain((0, 1))(X[i : i + 1], C[i : i + 1]) for i in range(BATCH)]
    np.testing.assert_array_equal(values, [e.value for e in expected])
    found = jnp.moveaxis(adapter.read_grads(grads), 0, 1)  # layers first
    np.testing.assert_array_equal(found, [e.grads for e in expected])


def linear():
    return lp.nnx.Linear(4, 4, use_bias=False, recipe=RECIPE, rngs=nnx.Rngs(0))


def test_nnx_per_example__flag_aux_and_keyword__are_passed_on():
    def loss(model, x, scale, train):
        assert train is True
        return (model(x[None]) * scale).sum(), x[0]

    run = lp.nnx.per_example(loss, has_aux=True, advance=False)
    model, x = linear(), jnp.arange(12.0).reshape(3, 4)
    (values, aux), grads = run(model, x, jnp.ones(3), train=True)
    assert values.shape == (3,)
    assert aux.tolist() == [0, 4, 8]
    assert grads["kernel"][...].shape == (3, 4, 4)
    (site,) = lp.nnx.scaling_state(model).values()
    assert site["pending"][0, Column.AMAX] == 11
    assert site["pending"][0, Column.SIZE] == 12
    assert not site["amax_history"].any()


def calibrate(front_end, adapter, forward):
    carrier, x = adapter.start(stacked=False), jnp.asarray(X)
    if front_end == "functional":
        loss = lambda params, live, x: forward((params, live), x)  # noqa: E731
        lp.state.calibrate(loss, carrier["params"], carrier["state"], x)
    elif front_end == "linen":
        lp.linen.calibrate(forward, carrier, x)
    else:
        lp.nnx.calibrate(forward, nnx.merge(adapter.graphdef, carrier), x)


@pytest.mark.parametrize("front_end", ADAPTERS)
def test_calibrate__vmap_in_the_loss__is_refused_with_the_way_out(front_end):
    adapter = ADAPTERS[front_end](RECIPE)
    with pytest.raises(UserError, match=r"under vmap.*pass the whole batch.*per_example"):
        calibrate(front_end, adapter, lambda net, x: adapter.vmapped(net, x).sum())


def test_value_and_grad__error_of_the_loss_itself__is_not_explained():
    def loss(params, live, x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine"):
        lp.state.value_and_grad(loss)(jnp.ones(2), {}, X)


def test_value_and_grad__lax_cond_around_a_layer__note_names_the_cond_of_each_front_end():
    adapter = ADAPTERS["functional"](RECIPE)
    carrier = adapter.start(stacked=False)

    def forward(net, x):
        return jax.lax.cond(x.max() > 0, lambda: adapter.chain(net, x), lambda: x)

    with pytest.raises(KeyError) as caught:
        jax.jit(adapter.step(forward))(carrier, jnp.asarray(X), jnp.asarray(C))
    notes = " ".join(caught.value.__notes__)
    assert all(f"lowprec_jax.{part}.cond" in notes for part in ("ops", "linen", "nnx"))


# nnx.cond: what a branch changes.


class Normed(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.layer = linear()

    def __call__(self, x):
        return self.layer(self.norm(x))


@pytest.mark.parametrize("taken", [True, False])
def test_nnx_cond__branch_with_batch_norm__its_statistics_change_if_it_runs(taken):
    x = jnp.arange(12.0).reshape(3, 4)

    def loss(model, x, flag):
        return lp.nnx.cond(flag, lambda m, x: m(x), lambda m, x: x, model, x).sum()

    model, plain = Normed(), Normed()
    _, grads = nnx.jit(lp.nnx.value_and_grad(loss))(model, x, jnp.bool_(taken))
    if taken:
        _, expected = nnx.jit(lp.nnx.value_and_grad(lambda m, x: m(x).sum()))(plain, x)
        jax.tree.map(np.testing.assert_array_equal, grads, expected)
    np.testing.assert_array_equal(model.norm.mean[...], plain.norm.mean[...])
    (found,), (expected,) = (lp.nnx.scaling_state(m).values() for m in (model, plain))
    np.testing.assert_array_equal(found["amax_history"], expected["amax_history"])


def test_nnx_cond__flags_and_pytrees_among_the_operands__reach_the_branches():
    def loss(model, x):
        def branch(m, pair, flag):
            return m(pair["x"]) * (2.0 if flag else 3.0)

        return lp.nnx.cond(x.max() > 0, branch, branch, model, {"x": x}, True).sum()

    model = linear()
    value, _ = lp.nnx.value_and_grad(loss)(model, jnp.ones((2, 4)))
    expected, _ = lp.nnx.value_and_grad(lambda m, x: 2 * m(x).sum())(linear(), jnp.ones((2, 4)))
    np.testing.assert_array_equal(value, expected)
