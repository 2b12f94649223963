"""Calibration: step 0 is as good as later ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax import ops, state
from lowprec_jax.recipes import FP8_DELAYED, Role, init_state, is_calibrated

NN = (((1,), (0,)), ((), ()))
ROWS, WIDTH, COLUMNS = 131_072, 32, 24


def _mean_loss(w, live, x, target, recipe=FP8_DELAYED):
    out = ops.dot_general(x, w, NN, recipe=recipe, state=live.get("layer"))
    return jnp.square(out - target).mean()


def _small(rows=16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(WIDTH, COLUMNS), (rows, WIDTH), (rows, COLUMNS)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def _tree():
    return {"layer": init_state(FP8_DELAYED)}


@pytest.fixture(scope="module")
def step_zero_errors():
    """Relative Frobenius errors of the first kernel gradient: (calibrated, not calibrated)."""
    w, x, target = _small(ROWS)
    w = w / WIDTH**0.5
    residual = np.float64(x) @ np.float64(w) - np.float64(target)
    exact = 2 / (ROWS * COLUMNS) * np.float64(x).T @ residual
    step = jax.jit(state.value_and_grad(_mean_loss))
    calibrated = jax.jit(lambda *args: state.calibrate(_mean_loss, *args))(w, _tree(), x, target)
    grads = [step(w, tree, x, target)[0][1] for tree in (calibrated, _tree())]
    return [float(np.linalg.norm(g - exact) / np.linalg.norm(exact)) for g in grads]


def test_calibrate__mean_over_131072_rows__first_gradient_is_within_6_percent(step_zero_errors):
    """The gate; Flax's op starts with 0.566 on such a loss."""
    assert step_zero_errors[0] <= 0.06


def test_calibrate__left_out__first_gradient_underflows(step_zero_errors):
    calibrated, cold = step_zero_errors
    assert calibrated < 0.06 < 0.5 < cold


def test_calibrate__one_batch__fills_the_newest_slot_with_the_amaxes_of_high_precision():
    w, x, target = _small()
    site = jax.jit(lambda *a: state.calibrate(_mean_loss, *a))(w, _tree(), x, target)["layer"]
    grad = jax.jit(jax.grad(lambda y: jnp.square(y - target).mean()))(x @ w)
    amaxes = [np.abs(np.asarray(a)).max() for a in (x, w, grad)]
    # The gradient's is that of a product; eps of f32 is 6e-8.
    np.testing.assert_array_equal(site["amax_history"][:2, 0], amaxes[:2])
    np.testing.assert_allclose(site["amax_history"][2, 0], amaxes[2], rtol=1e-6)
    np.testing.assert_array_equal(site["amax_history"][:, 1:], 0)
    np.testing.assert_array_equal(site["pending"], 0)
    assert bool(is_calibrated(site))


def test_calibrate__eager__equals_jit():
    w, x, target = _small()
    eager = state.calibrate(_mean_loss, w, _tree(), x, target)
    jitted = jax.jit(lambda *a: state.calibrate(_mean_loss, *a))(w, _tree(), x, target)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)


def test_calibrate__without_gradient__observes_the_forward_operands_only():
    w, x, target = _small()
    site = state.calibrate(_mean_loss, w, _tree(), x, target, gradient=False)["layer"]
    assert (site["amax_history"][:2, 0] > 0).all()
    np.testing.assert_array_equal(site["amax_history"][Role.OUTPUT_GRAD], 0)
    assert not bool(is_calibrated(site))


def test_calibrate__again__keeps_what_the_histories_know():
    w, x, target = _small()
    calibrate = jax.jit(lambda *a: state.calibrate(_mean_loss, *a))
    first = calibrate(w, _tree(), x, target)["layer"]["amax_history"]
    second = calibrate(2 * w, {"layer": calibrate(w, _tree(), x, target)["layer"]}, x, target)
    np.testing.assert_array_equal(second["layer"]["amax_history"][:, 1], first[:, 0])
    np.testing.assert_array_equal(second["layer"]["amax_history"][1, 0], 2 * first[1, 0])


def test_calibrate__loss_with_aux__uses_the_value():
    w, x, target = _small()
    with_aux = lambda *a: (_mean_loss(*a), "aux")  # noqa: E731
    ours = state.calibrate(with_aux, w, _tree(), x, target)
    plain = state.calibrate(_mean_loss, w, _tree(), x, target)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)
