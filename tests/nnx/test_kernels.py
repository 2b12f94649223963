"""Kernels that are quantized once in a step: the same numbers, less often."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.ops.program import executed_operations
from lowprec_jax.recipes import get_recipe

from .helpers import (
    C_STACK,
    HIDDEN,
    LAYERS,
    WIDTH,
    C,
    Mlp,
    Pair,
    X,
    assert_same,
    lax_scan_of_checkpoint,
    linear,
    pair_loss,
    scan,
    scan_of_remat,
    stack,
    two_steps,
)


@pytest.mark.parametrize("recipe", ["fp8_delayed", "fp8_current", "mxfp8", "fp8_block"])
@pytest.mark.parametrize(
    "run", [scan, scan_of_remat, lax_scan_of_checkpoint], ids=lambda f: f.__name__
)
def test_quantize_once__scan_over_layers__changes_no_bit(run, recipe):
    def loss(layers, x, c):
        return (jnp.sin(run(layers, x)) * c).sum()

    recipe = dataclasses.replace(get_recipe(recipe), observe=True)  # so that it keeps state
    expected = two_steps(stack(LAYERS, recipe), loss, X, C_STACK)
    actual = two_steps(stack(LAYERS, recipe), loss, X, C_STACK, quantize_once=True)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_quantize_once__compute_dtype_of_the_layer__changes_no_bit(dtype):
    def model():
        layer = nnx.Linear(WIDTH, (HIDDEN), dtype=dtype, rngs=nnx.Rngs(0))
        return lp.nnx.quantize(layer, "fp8_delayed")

    def loss(layer, x, c):
        return (layer(x).astype(jnp.float32) * c).sum()

    expected = two_steps(model(), loss, X, C)
    assert_same(two_steps(model(), loss, X, C, quantize_once=True), expected)


@pytest.mark.parametrize("recipe", ["fp8_delayed", "fp8_rowwise"])
def test_quantize_once__layers_of_other_kinds__are_left_alone(recipe):
    """Kernels with batch axes, einsums, and ops that change their operands."""
    recipe = dataclasses.replace(get_recipe(recipe), observe=True)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.batched = nnx.LinearGeneral(
                WIDTH, HIDDEN, axis=-1, batch_axis={0: X.shape[0]}, rngs=rngs
            )
            self.einsum = nnx.Einsum("bi,io->bo", (WIDTH, HIDDEN), rngs=rngs)
            self.mlp = lp.nnx.GatedMlp(WIDTH, HIDDEN, recipe=recipe, smooth=True, rngs=rngs)

        def __call__(self, x):
            return self.batched(x) + self.einsum(x) + self.mlp(x).sum()

    def model():
        return lp.nnx.quantize(Model(nnx.Rngs(0)), recipe)

    def loss(model, x, c):
        return (model(x) * c).sum()

    expected = two_steps(model(), loss, X, C)
    assert_same(two_steps(model(), loss, X, C, quantize_once=True), expected)


def test_quantize_once__model_after_a_step__is_as_before():
    model = lp.nnx.quantize(Mlp(nnx.Rngs(0)), "fp8_delayed")
    before = nnx.graphdef(model)
    lp.nnx.value_and_grad(lambda m, x: m(x).sum(), quantize_once=True)(model, X)
    assert nnx.graphdef(model) == before


def _casts_of_kernels(loss, model, *args, **options):
    """How many elements of kernels of [WIDTH, HIDDEN] a step casts, in kernels."""

    @jax.jit
    def step(state, *args):
        model = nnx.merge(graphdef, state)
        out = lp.nnx.accumulate(loss, 4, **options)(model, *args)
        return out, nnx.state(model)

    graphdef, state = nnx.split(model)
    total = 0
    for executed in executed_operations(step.lower(state, *args)):
        if executed.op.name == "stablehlo.convert":
            to = executed.op.results[0].type
            if str(to.element_type) == "ui8" and list(to.shape)[-2:] == [WIDTH, HIDDEN]:
                total += executed.times * np.prod(to.shape) / (WIDTH * HIDDEN)
    return total


def test_quantize_once__micro_batches__cast_each_kernel_once():
    def count(**options):
        model = lp.nnx.quantize(Pair(nnx.Rngs(0)), "fp8_delayed")
        return _casts_of_kernels(pair_loss, model, X, C, **options)

    assert count() == 2 * 4
    assert count(quantize_once=True) == 2


def test_quantize_once__remat__casts_each_kernel_once():
    def loss(layer, x, c):
        x = x * layer.kernel[...].mean()  # so that its gradient needs the kernel
        return (nnx.remat(lambda layer, x: layer(x))(layer, x) * c).sum()

    assert _casts_of_kernels(loss, linear(), X, C) == 2 * 4
    assert _casts_of_kernels(loss, linear(), X, C, quantize_once=True) == 1
