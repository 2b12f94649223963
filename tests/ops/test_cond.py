"""`ops.cond`: gradients and observations of the branch that runs, and of no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lowprec_jax import ops, state
from lowprec_jax.recipes import FP8_DELAYED, Column, init_state

NN = (((1,), (0,)), ((), ()))
X = jax.random.normal(jax.random.key(0), (16, 32))
C = jax.random.normal(jax.random.key(1), (16, 24))
W = {
    "yes": jax.random.normal(jax.random.key(2), (32, 24)),
    "no": 2 * jax.random.normal(jax.random.key(3), (32, 24)),
}


def _fresh():
    return {name: init_state(FP8_DELAYED) for name in W}


def _branch(name, scale):
    def run(w, live, x):
        out = ops.dot_general(x, w[name], NN, recipe=FP8_DELAYED, state=live[name])
        return scale * out

    return run


YES, NO = _branch("yes", 1.0), _branch("no", 3.0)


def _loss(w, live, x, pred):
    return (ops.cond(pred, YES, NO, w, live, x) * C).sum()


def _plain(name):
    """The loss without a cond."""
    branch = {"yes": YES, "no": NO}[name]
    return lambda w, live, x: (branch(w, live, x) * C).sum()


_step = jax.jit(state.value_and_grad(_loss))


def _assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("pred", "taken"), [(True, "yes"), (False, "no")])
def test_cond__under_grad_and_jit__is_the_taken_branch_in_value_gradient_and_state(pred, taken):
    expected = jax.jit(state.value_and_grad(_plain(taken)))(W, _fresh(), X)
    actual = _step(W, _fresh(), X, jnp.array(pred))
    _assert_same(actual, expected)
    other = {"yes": "no", "no": "yes"}[taken]
    _assert_same(actual[1][other], init_state(FP8_DELAYED))
    assert (actual[1][taken]["pending"][:, Column.AMAX] > 0).all()


def test_cond__no_gradient_and_no_sinks__is_the_taken_branch():
    run = jax.jit(lambda pred: ops.cond(pred, YES, NO, W, _fresh(), X))
    _assert_same(run(jnp.array(True)), jax.jit(lambda: YES(W, _fresh(), X))())
    _assert_same(run(jnp.array(False)), jax.jit(lambda: NO(W, _fresh(), X))())


def test_cond__sinks_and_no_gradient__observes_the_operands_of_the_taken_branch():
    def run(pred):
        live = state.make_sinks(_fresh())
        ops.cond(pred, YES, NO, W, live, X)
        return state.collect(_fresh(), live)

    seen = jax.jit(run)(jnp.array(False))
    np.testing.assert_array_equal(seen["yes"]["pending"], 0)
    np.testing.assert_array_equal(
        seen["no"]["pending"][:, Column.AMAX], [jnp.abs(X).max(), jnp.abs(W["no"]).max(), 0]
    )


def test_cond__gradient_of_an_operand__flows_to_the_input_too():
    def loss(wx, live, pred):
        return _loss(wx[0], live, wx[1], pred)

    def plain(wx, live):
        return _plain("no")(wx[0], live, wx[1])

    (_, grads), _ = jax.jit(state.value_and_grad(loss))((W, X), _fresh(), jnp.array(False))
    (_, expected), _ = jax.jit(state.value_and_grad(plain))((W, X), _fresh())
    _assert_same(grads, expected)
    assert np.abs(grads[1]).max() > 0


def test_cond__integer_operands__are_passed_and_not_differentiated():
    def loss(w, live, i):
        take = lambda w, live, i: YES(w, live, X)[i]  # noqa: E731
        return ops.cond(i > 2, take, lambda w, live, i: 2 * take(w, live, i), w, live, i).sum()

    (value, grads), _ = jax.jit(state.value_and_grad(loss))(W, _fresh(), jnp.int32(5))
    np.testing.assert_allclose(value, jax.jit(lambda: YES(W, _fresh(), X)[5].sum())(), rtol=1e-5)
    assert np.abs(grads["yes"]).max() > 0


def test_cond__in_a_scan__observes_the_maximum_over_the_steps_that_took_it():
    xs = jnp.stack([X, 2 * X, 4 * X])
    preds = jnp.array([True, False, True])

    def loss(w, live, xs, preds):
        def body(total, s):
            return total + _loss(w, live, *s), None

        return lax.scan(body, jnp.float32(0), (xs, preds))[0]

    (_, grads), seen = jax.jit(state.value_and_grad(loss))(W, _fresh(), xs, preds)
    amax = float(jnp.abs(X).max())
    assert float(seen["yes"]["pending"][0, Column.AMAX]) == 4 * amax
    assert float(seen["no"]["pending"][0, Column.AMAX]) == 2 * amax
    steps = [_step(W, _fresh(), x, p)[0][1] for x, p in zip(xs, preds, strict=True)]
    expected = jax.tree.map(lambda *g: sum(g), *steps)
    # f32 sums of three gradients in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), grads, expected
    )


def test_cond__under_remat__gives_the_same_gradients_and_state():
    remat = lambda w, live, x, p: jax.checkpoint(lambda w, x: _loss(w, live, x, p))(w, x)  # noqa: E731
    actual = jax.jit(state.value_and_grad(remat))(W, _fresh(), X, jnp.array(True))
    _assert_same(actual[0], _step(W, _fresh(), X, jnp.array(True))[0])
    np.testing.assert_array_equal(actual[1]["no"]["pending"], 0)
