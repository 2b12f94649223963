"""Gradient accumulation: the state of the whole batch, pushed once per optimizer step."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.errors import UserError

from .helpers import (
    BATCH,
    LABELS,
    C,
    Classifier,
    Pair,
    X,
    amaxes,
    assert_same,
    cross_entropy,
    kernel_of,
    linear,
    linear_loss,
    newest,
    pair_loss,
    pending,
)


def _accumulated(micro_batches, recipe, loss=pair_loss, steps=2, **kwargs):
    model = lp.nnx.quantize(Pair(nnx.Rngs(0)), recipe)
    step = nnx.jit(lp.nnx.accumulate(loss, micro_batches, **kwargs))
    outs = [step(model, f * X, C) for f in (1.0, 2.0)[:steps]]
    return outs[-1], model


@pytest.fixture(scope="module")
def whole():
    return {recipe: _accumulated(1, recipe) for recipe in ("none", "fp8_delayed")}


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulate__k_micro_batches__state_is_bitwise_that_of_the_whole_batch(
    micro_batches, whole
):
    _, model = _accumulated(micro_batches, "fp8_delayed")
    first = newest(model)["first"]
    np.testing.assert_array_equal(first, amaxes(2 * X, kernel_of(model.first), C))
    state = lp.nnx.scaling_state(model)
    expected = lp.nnx.scaling_state(whole["fp8_delayed"][1])
    # Weights are observed once per micro-batch: their counts differ, nothing else does.
    for site, other in zip(state.values(), expected.values(), strict=True):
        size = site["observed"][1, lp.recipes.Column.SIZE]
        assert size == micro_batches * other["observed"][1, lp.recipes.Column.SIZE]
        for part in ("amax_history", "pending"):
            np.testing.assert_array_equal(site[part], other[part])
        since = [lp.recipes.Record.AGE, lp.recipes.Record.DROPPED]
        np.testing.assert_array_equal(site["observed"][:, since], other["observed"][:, since])
        np.testing.assert_array_equal(site["observed"][::2], other["observed"][::2])


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulate__recipe_none__value_and_gradients_are_those_of_the_whole_batch(
    micro_batches, whole
):
    out, _ = _accumulated(micro_batches, "none")
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(whole["none"][0]), strict=True):
        # Sums in another order: relative to the largest entry, as the terms cancel.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_accumulate__batch_norm_and_dropout__are_carried_as_in_a_loop_over_parts():
    model, looped = Classifier(nnx.Rngs(0)), Classifier(nnx.Rngs(0))
    lp.nnx.quantize(model, "none")
    value, grads = nnx.jit(lp.nnx.accumulate(cross_entropy, 4))(model, X, LABELS)
    grad = nnx.jit(nnx.value_and_grad(cross_entropy))
    parts = [
        grad(looped, x, labels)
        for x, labels in zip(X.reshape(4, 4, -1), LABELS.reshape(4, 4), strict=True)
    ]
    np.testing.assert_allclose(value, sum(v for v, _ in parts), rtol=1e-6)
    total = jax.tree.map(lambda *g: sum(g), *(g for _, g in parts))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
    for a, b in ((model.norm.mean, looped.norm.mean), (model.norm.var, looped.norm.var)):
        np.testing.assert_allclose(a[...], b[...], rtol=1e-6)
    assert model.dropout.rngs.count[...] == looped.dropout.rngs.count[...] == 4


def test_accumulate__has_aux__aux_of_every_part_on_a_leading_axis():
    def loss(model, x, c):
        return pair_loss(model, x, c), x[:, 0]

    ((_, aux), _), _ = _accumulated(4, "fp8_delayed", loss, steps=1, has_aux=True)
    np.testing.assert_array_equal(aux, X[:, 0].reshape(4, 4))


def test_accumulate__models_in_a_list_and_a_flag__only_arrays_are_split():
    """A list of models was taken for data, and its scaling state cut into micro-batches."""

    def loss(models, batch, doubled):
        return (1 + doubled) * linear_loss(models[0], batch["x"], batch["c"])

    layer = linear()
    lp.nnx.accumulate(loss, 2)([layer], {"x": X, "c": C}, True)
    np.testing.assert_array_equal(newest(layer)[""], amaxes(X, kernel_of(layer), 2 * C))


def test_accumulate__batch_that_cannot_be_split__raises_with_its_shape():
    with pytest.raises(UserError, match=rf"\({BATCH}, 12\) cannot be split into 3"):
        lp.nnx.accumulate(linear_loss, 3)(linear(), X, C)


def test_accumulate__gradient_of_what_is_split__raises():
    """It returned the sum of the gradients of unrelated rows."""
    with pytest.raises(UserError, match="argument 1 is differentiated"):
        lp.nnx.accumulate(linear_loss, 2, argnums=(0, 1))(linear(), X, C)


def test_advance__optax_multi_steps__pushes_once_per_optimizer_step():
    transform = optax.MultiSteps(optax.sgd(1e-4), 4)
    layer = linear()
    optimizer = nnx.Optimizer(layer, transform, wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x, c):
        _, grads = lp.nnx.value_and_grad(linear_loss, advance=False)(layer, x, c)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts micro-batches in int32
            optimizer.update(layer, grads)
        state = nnx.as_pure(optimizer.opt_state)
        lp.nnx.advance(layer, when=transform.has_updated(state))

    xs, cs = X.reshape(4, 4, -1), C.reshape(4, 4, -1)
    for i in range(8):
        before = kernel_of(layer)
        step(layer, optimizer, xs[i % 4], cs[i % 4])
        (state,) = lp.nnx.scaling_state(layer).values()
        assert (state["amax_history"] > 0).sum(-1).tolist() == [(i + 1) // 4] * 3
        if i % 4 == 3:
            np.testing.assert_array_equal(newest(layer)[""], amaxes(X, before, C))
            assert not pending(layer)[""].any()


def test_advance__two_calls_for_one_step__pushes_the_larger_once():
    first, second = linear(), linear(seed=1)
    grad = nnx.jit(lp.nnx.value_and_grad(linear_loss, advance=False))
    before = lp.nnx.scaling_state(first)["dot_general"]["amax_history"]
    grad(first, X, C)
    grad(first, 3 * X, C / 3)
    assert_same(lp.nnx.scaling_state(first)["dot_general"]["amax_history"], before)
    grad(second, X, C)
    lp.nnx.advance(first, second)
    np.testing.assert_array_equal(newest(first)[""], amaxes(3 * X, kernel_of(first), C))
    np.testing.assert_array_equal(newest(second)[""], amaxes(X, kernel_of(second), C))
    after = lp.nnx.scaling_state(first)["dot_general"]
    lp.nnx.advance(first)
    assert_same(lp.nnx.scaling_state(first)["dot_general"], after)
