"""One tiny network, exact data, and what NumPy says of it.

Two layers ``relu(x @ w)``. Inputs, weights and cotangents are small powers of two and a weight is a
signed permutation, so that every format holds every operand exactly and every sum is exact in any
order: values, gradients and amaxes are the same, bit for bit, under every transform and layout.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowprec_jax.recipes import Column, Gemm, Record, Role, init_state, recipes

WIDTH, BATCH, LAYERS, DEVICES, STEPS = 32, 16, 2, 8, 2


def _signs(rng, shape):
    return rng.choice([-1.0, 1.0], shape)


def _make_data():
    rng = np.random.default_rng(0)
    rows = np.ones((BATCH, 1))
    rows[11], rows[3] = 4.0, 2.0  # the amax of the batch is in one micro-batch, on one device
    x = _signs(rng, (BATCH, WIDTH)) * rows
    c = _signs(rng, (BATCH, WIDTH)) * np.roll(rows, 5)
    w = np.stack(
        [
            np.eye(WIDTH)[rng.permutation(WIDTH)] * _signs(rng, WIDTH) * (i + 1)
            for i in range(LAYERS)
        ]
    )
    return tuple(np.float32(a) for a in (x, c, w))


X, C, W = _make_data()
# The amaxes that the histories start with: nothing saturates in the first step.
FIRST = np.array([64.0, 4.0, 64.0], np.float32)


def batch(step):
    """The batch of a step, 0 or 1; the second is larger, so that scales move."""
    return jnp.asarray(X * 2**step), jnp.asarray(C)


def exact(recipe):
    """A recipe on whose grid the data are: scales are powers of two, nothing is rotated."""

    def unrotated(gemm):
        return gemm and Gemm(
            *(side and dataclasses.replace(side, hadamard=0) for side in (gemm.left, gemm.right))
        )

    gemms = {name: unrotated(getattr(recipe, name)) for name in ("fwd", "dgrad", "wgrad")}
    return dataclasses.replace(recipe, scale_rounding="power_of_two", **gemms)


def state_kind(recipe):
    """What a recipe's state is for: nothing, histories, or a counter."""
    return recipe.quantizes, recipe.delayed, recipe.stochastic


def recipe_groups():
    """All registered recipes, and one that observes without delay, by the state they keep."""
    current = next(r for r in recipes() if r.quantizes and not r.stateful)
    observing = dataclasses.replace(current, name="observing", observe=True)
    groups = {}
    for recipe in [*recipes(), observing]:
        groups.setdefault(state_kind(recipe), []).append(exact(recipe))
    return list(groups.values())


def start_site(recipe, stack=()):
    """State of a call site that has seen one batch; empty for a recipe without state."""
    site = init_state(recipe, stack)
    if "amax_history" in site:
        site["amax_history"] = site["amax_history"].at[..., 0].set(FIRST)
    return site


class Expected(NamedTuple):
    """What NumPy says of one step.

    Attributes:
      value: f64 [].
      grads: f64[LAYERS, WIDTH, WIDTH].
      amaxes: f64[LAYERS, 3], NaN where a layer is not observed.
      sizes: f64[LAYERS, 3], elements that were observed once.
    """

    value: np.ndarray
    grads: np.ndarray
    amaxes: np.ndarray
    sizes: np.ndarray


def chain(calls):
    """The oracle of layers that are called one after the other, by number of the layer."""

    def step(x, c):
        inputs, out = [], np.float64(x)
        for layer in calls:
            inputs.append(out)
            out = np.maximum(out @ W[layer], 0)
        value, grad = (out * c).sum(), np.float64(c) * (out > 0)
        grads, seen = np.zeros(W.shape), []
        for layer, lhs in reversed(list(zip(calls, inputs, strict=True))):
            seen.append((layer, lhs, W[layer], grad))
            grads[layer] += lhs.T @ grad
            grad = (grad @ W[layer].T) * (lhs > 0)
        return Expected(value, grads, *_observed(seen))

    return step


def experts(x, c):
    """The oracle of one layer per half of the batch."""
    halves = [(np.float64(a), np.float64(b)) for a, b in zip(*map(_halves, (x, c)), strict=True)]
    outs = [np.maximum(a @ W[i], 0) for i, (a, _) in enumerate(halves)]
    grads = [b * (out > 0) for out, (_, b) in zip(outs, halves, strict=True)]
    value = sum((out * b).sum() for out, (_, b) in zip(outs, halves, strict=True))
    dws = np.stack([a.T @ grad for (a, _), grad in zip(halves, grads, strict=True)])
    seen = [(i, halves[i][0], W[i], grads[i]) for i in range(LAYERS)]
    return Expected(value, dws, *_observed(seen))


def _halves(a):
    return np.split(np.asarray(a), LAYERS)


def _observed(seen):
    amaxes, sizes = np.full((LAYERS, len(Role)), np.nan), np.zeros((LAYERS, len(Role)))
    for layer, *operands in seen:
        amaxes[layer] = np.fmax(amaxes[layer], [np.abs(a).max() for a in operands])
        sizes[layer] += [a.size for a in operands]
    return amaxes, sizes


def expected_history(start, steps):
    """Histories f64[LAYERS, 3, window] after steps with the given amaxes."""
    history = np.float64(start)
    for amaxes in steps:
        pushed = np.concatenate([amaxes[..., None], history[..., :-1]], -1)
        history = np.where(np.isnan(amaxes)[..., None] | (amaxes == 0)[..., None], history, pushed)
    return history


def assert_state(site, recipe, steps):
    """Scaling state after steps, arrays stacked over layers, is what NumPy says.

    Amaxes are exact. Elements are counted once or more often: a replicated weight by every device
    and micro-batch, a recomputed branch twice.
    """
    start = start_site(recipe, (LAYERS,))
    if "amax_history" in start:
        history = expected_history(start["amax_history"], [s.amaxes for s in steps])
        np.testing.assert_array_equal(site["amax_history"], history)
    observed = ~np.isnan(steps[-1].amaxes)
    amaxes = np.where(observed, steps[-1].amaxes, 0)
    np.testing.assert_array_equal(site["observed"][..., Column.AMAX], amaxes)
    times = site["observed"][..., Column.SIZE][observed] / steps[-1].sizes[observed]
    assert (times >= 1).all(), times
    np.testing.assert_array_equal(times, np.round(times))
    np.testing.assert_array_equal(site["observed"][..., Column.SIZE][~observed], 0)
    for column in (Column.SATURATED, Column.UNDERFLOW, Column.NONFINITE):
        np.testing.assert_array_equal(site["observed"][..., column], 0)
    np.testing.assert_array_equal(site["pending"], 0)
    np.testing.assert_array_equal(site["observed"][..., Record.DROPPED], 0)


def stack_of(trees):
    """A list of equal pytrees as one with a leading axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
