"""A kernel that is quantized once for many calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax import ops, state
from lowprec_jax.recipes import (
    FP8_CURRENT,
    FP8_DELAYED,
    NONE,
    get_recipe,
    init_state,
    recipes,
)

NN = (((1,), (0,)), ((), ()))
ROWS, INPUTS, OUTPUTS, LAYERS = 24, 64, 64, 3
QUANTIZED = [r.name for r in recipes() if r.fwd is not None and r.fwd.right is not None]


def _arrays(*stack):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    kernel = rng.normal(size=(*stack, INPUTS, OUTPUTS)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(kernel)


def _state(recipe, *stack):
    """State whose scales differ by layer, role and GEMM."""
    state = init_state(get_recipe(recipe), stack)
    if "amax_history" in state:
        rng = np.random.default_rng(1)
        history = rng.uniform(1, 8, state["amax_history"].shape)
        state["amax_history"] = jnp.asarray(history, jnp.float32)
    return state


def _step(recipe, x, kernel, state, quantized):
    """Output, gradients and observation of one layer."""

    @jax.jit
    def step(x, kernel, state, quantized):
        probe = ops.Probe(jnp.zeros((3, 5)))

        def loss(x, kernel, probe):
            live = {**state, "sink": probe}
            y = ops.dot_general(x, kernel, NN, recipe=recipe, state=live, rhs_quantized=quantized)
            return (y * jnp.cos(y)).sum(), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, kernel, probe)

    return step(x, kernel, state, quantized)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_quantize_rhs__every_recipe__gives_what_the_op_computes_itself(recipe):
    x, kernel = _arrays()
    state = _state(recipe)
    history = state.get("amax_history")
    quantized = ops.quantize_rhs(kernel, (0,), recipe=recipe, history=history)
    assert quantized is not None
    expected = _step(recipe, x, kernel, state, None)
    actual = _step(recipe, x, kernel, state, quantized)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("recipe", ["fp8_delayed", "fp8_current", "fp8_rowwise", "mxfp8"])
def test_quantize_rhs__stack__is_that_of_every_layer(recipe):
    _, kernels = _arrays(2, LAYERS)
    state = _state(recipe, 2, LAYERS)
    history = state.get("amax_history")
    stacked = ops.quantize_rhs(kernels, (0,), recipe=recipe, history=history, stack=2)
    for i, j in np.ndindex(2, LAYERS):
        own = None if history is None else history[i, j]
        one = ops.quantize_rhs(kernels[i, j], (0,), recipe=recipe, history=own)
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda x, i=i, j=j: x[i, j], stacked), one
        )


@pytest.mark.parametrize(
    "recipe", [NONE, dataclasses.replace(FP8_CURRENT, fwd=None), FP8_DELAYED], ids=lambda r: r.name
)
def test_quantize_rhs__nothing_to_quantize_or_no_history__is_none(recipe):
    assert ops.quantize_rhs(_arrays()[1], (0,), recipe=recipe) is None


def test_dot_general__kernel_given__a_scan_stacks_neither_it_nor_scales():
    """What a scan gets from outside it need not stack for its backward pass."""
    x, kernels = _arrays(LAYERS)
    state = _state("fp8_delayed", LAYERS)
    history = state["amax_history"]
    given = ops.quantize_rhs(kernels, (0,), recipe="fp8_delayed", history=history, stack=1)
    probes = ops.Probe(jnp.zeros((LAYERS, 3, 5)))

    def loss(kernels, probes, quantized, x):
        def layer(x, row):
            kernel, probe, state, quantized = row
            live = {**state, "sink": probe}
            y = ops.dot_general(
                x, kernel, NN, recipe="fp8_delayed", state=live, rhs_quantized=quantized
            )
            return jnp.tanh(y), None

        return jax.lax.scan(layer, x, (kernels, probes, state, quantized))[0].sum()

    def stacked(quantized):
        """Shapes that the forward scan stacks, in elements of a layer."""
        gradient = jax.grad(functools.partial(loss, quantized=quantized, x=x), (0, 1))
        forward = next(
            e for e in jax.make_jaxpr(gradient)(kernels, probes).eqns if e.primitive.name == "scan"
        )
        outputs = forward.outvars[forward.params["num_carry"] :]
        return sorted(v.aval.size // LAYERS for v in outputs)

    kernel = INPUTS * OUTPUTS
    assert kernel in stacked(None)
    assert kernel not in stacked(given)
    # The kept input, what tanh keeps of its own, and the counts of both operands.
    assert set(stacked(given)) == {ROWS * INPUTS, 2 * 4}


@pytest.mark.parametrize("which", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize("given", [False, True])
def test_dot_general__delayed_and_rotated__scale_is_that_of_the_rotated_operand(which, given):
    """The history holds amaxes of operands as they are: it knows no scale of rotated ones."""
    recipe = get_recipe("fp8_delayed")
    gemm = recipe.gemm(which)
    left, right = (dataclasses.replace(q, hadamard=16) for q in (gemm.left, gemm.right))
    rotated = dataclasses.replace(gemm, left=left, right=right)
    recipe = dataclasses.replace(recipe, name="rotated", **{which: rotated})
    rng = np.random.default_rng(0)
    x, w, c = (rng.normal(size=s).astype(np.float32) for s in ((32, 64), (64, 32), (32, 32)))

    def loss(operands, live):
        x, w = operands
        history = live["amax_history"]
        codes = ops.quantize_rhs(w, (0,), recipe=recipe, history=history) if given else None
        y = ops.dot_general(x, w, NN, recipe=recipe, state=live, rhs_quantized=codes)
        return (y * c).sum(), y

    scaling = init_state(recipe)
    ((_, y), grads), _ = state.value_and_grad(loss, has_aux=True)((x, w), scaling)
    for actual, exact in ((y, x @ w), (grads[0], c @ w.T), (grads[1], x.T @ c)):
        error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
        assert error < 2**-4 + 2**-3  # the largest rounding errors of e4m3 and e5m2
