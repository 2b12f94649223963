"""Observing into probes that are variables of the model: the same state as into refs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowprec_jax as lp
from lowprec_jax.nnx.sites import iter_sites
from lowprec_jax.recipes import get_recipe

from .helpers import (
    C_STACK,
    LAYERS,
    C,
    Pair,
    X,
    arrays,
    assert_same,
    lax_scan_of_checkpoint,
    pair_loss,
    scan,
    scan_of_remat,
    stack,
    two_steps,
)


def _pair(seed=0):
    return lp.nnx.quantize(Pair(nnx.Rngs(seed)), "fp8_delayed")


@pytest.mark.parametrize(
    ("run", "recipe", "once"),
    [
        (scan, "fp8_delayed", False),
        (scan, "fp8_current", False),
        (scan, "mxfp8", False),
        (scan_of_remat, "fp8_delayed", True),
        (lax_scan_of_checkpoint, "fp8_delayed", True),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)).strip("_"),
)
def test_probes__scan_over_layers__changes_no_bit(run, recipe, once):
    def loss(layers, x, c):
        return (jnp.sin(run(layers, x)) * c).sum()

    recipe = dataclasses.replace(get_recipe(recipe), observe=True)  # so that it keeps state
    expected = two_steps(stack(LAYERS, recipe), loss, X, C_STACK)
    options = {"probes": True, "quantize_once": once}
    assert_same(two_steps(stack(LAYERS, recipe), loss, X, C_STACK, **options), expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_probes__micro_batches__are_merged_as_refs_are(parts):
    def run(**options):
        model = _pair()
        step = nnx.jit(lp.nnx.accumulate(pair_loss, parts, **options))
        return [step(model, f * X, C) for f in (1.0, 3.0)], arrays(model)

    assert_same(run(probes=True), run())


def test_probes__several_differentiated_arguments__each_gets_its_gradients():
    def loss(first, x, second):
        return pair_loss(first, x, C) * pair_loss(second, x, 2 * C)

    def run(**options):
        first, second = _pair(), _pair(1)
        argnums = (0, nnx.DiffState(2, nnx.Param))
        step = nnx.jit(lp.nnx.value_and_grad(loss, argnums=argnums, **options))
        return [step(first, X, second) for _ in range(2)], arrays(first), arrays(second)

    assert_same(run(probes=True), run())


def test_probes__array_among_the_differentiated_arguments__gets_its_gradient():
    def run(**options):
        model = _pair()
        grad = lp.nnx.value_and_grad(pair_loss, argnums=(0, 1), **options)
        return nnx.jit(grad)(model, X, C), arrays(model)

    assert_same(run(probes=True), run())


def test_probes__model_that_is_not_differentiated__observes_into_refs():
    def loss(model, x, teacher):
        return (pair_loss(model, x, C) - jax.lax.stop_gradient(pair_loss(teacher, x, C))) ** 2

    def run(**options):
        model, teacher = _pair(), _pair(1)
        step = nnx.jit(lp.nnx.value_and_grad(loss, **options))
        return step(model, X, teacher), arrays(model), arrays(teacher)

    assert_same(run(probes=True), run())


def test_probes__program__has_no_refs_and_is_smaller():
    model = stack(LAYERS, "fp8_delayed")
    graphdef, state = nnx.split(model)

    def loss(layers, x):
        return (jnp.sin(scan(layers, x)) * C_STACK).sum()

    def lines(**options):
        def step(state):
            model = nnx.merge(graphdef, state)
            out = lp.nnx.value_and_grad(loss, **options)(model, X)
            return out, nnx.state(model)

        return str(jax.make_jaxpr(step)(state)), jax.jit(step).lower(state).as_text().count("\n")

    (with_refs, longer), (with_probes, shorter) = lines(), lines(probes=True)
    assert "Ref{" in with_refs
    assert "Ref{" not in with_probes
    assert shorter < longer


def test_probes__loss_that_fails__leaves_no_probe_behind():
    model = _pair()

    def loss(model, x):
        raise RuntimeError(f"after {len(list(iter_sites(model)))} sites")

    with pytest.raises(RuntimeError, match="after 2 sites"):
        lp.nnx.value_and_grad(loss, probes=True)(model, X)
    assert all(site.probe is None for _, site in iter_sites(model))
    assert np.isfinite(lp.nnx.value_and_grad(pair_loss, probes=True)(model, X, C)[0])
