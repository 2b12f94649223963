"""Eight devices against one: the same losses, the same scales, two collectives.

FP8 is chaotic: one code that rounds the other way is about 6 %. Its losses are therefore compared
with a noise floor: what a single device gives for initial weights multiplied by
``1 + 1e-7 * N(0, 1)``, less than one unit in the last place of f32.
"""

import collections
import functools
import re

import jax
import numpy as np
import pytest

from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.step import build_step
from training.helpers import (
    assert_same_scaling,
    batch_of,
    compiled,
    copy,
    network_of,
    start,
    tiny_config,
)

STEPS = 20
DEVICES = 8


def config_of(recipe: str, devices: int = 1, **optim):
    return tiny_config(recipe=recipe, batch_size=16, devices=devices, optim=optim)


def step_of(config, state):
    return build_step(
        network_of(config),
        build_optimizer(config),
        state,
        micro_batches=config.optim.accumulate,
    )


def put_batch(config, number):
    return network_of(config).layout.put_batch(batch_of(config, number))


def placed(config, state):
    """A host state on the devices of a config."""
    return jax.device_put(state, network_of(config).layout.shardings(state))


@functools.cache
def host_start(recipe: str):
    """The one initial state of both meshes, on the host."""
    return jax.device_get(start(config_of(recipe)))


@functools.cache
def compiled_step(recipe: str, devices: int):
    """The compiled step and the state it starts from."""
    config = config_of(recipe, devices)
    state = placed(config, host_start(recipe))
    return config, compiled(step_of(config, state), state, put_batch(config, 1)), state


def losses(recipe: str, devices: int, perturb=lambda state: state):
    """Losses of 20 steps, and the scaling state after the first."""
    config, step, state = compiled_step(recipe, devices)
    state = perturb(copy(state))
    found = []
    for number in range(1, STEPS + 1):
        state, metrics = step(state, put_batch(config, number))
        found.append(float(metrics.loss))  # waits: emulated devices deadlock if steps pile up
        assert int(metrics.skipped) == 0
        if number == 1:
            first = jax.device_get(state.scaling)
    return np.array(found), first


single, parallel = (
    functools.cache(functools.partial(losses, devices=1)),
    functools.cache(functools.partial(losses, devices=DEVICES)),
)


def perturbed(seed: int):
    def perturb(state):
        leaves, treedef = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noisy = [
            p * (1 + 1e-7 * jax.random.normal(key, p.shape, p.dtype))
            for p, key in zip(leaves, keys, strict=True)
        ]
        return state._replace(params=treedef.unflatten(noisy))

    return perturb


@functools.cache
def noise_floor() -> np.ndarray:
    """For each step the spread (largest - smallest) of five perturbed single-device runs.

    The running maximum over the steps so far: runs that have come apart may meet by chance. Before
    the first code flips it is f32 rounding, for which 1e-6 of the loss is allowed.
    """
    runs = np.stack([losses("fp8_delayed", 1, perturbed(seed))[0] for seed in range(5)])
    spread = np.maximum.accumulate(np.ptp(runs, axis=0))
    return np.maximum(spread, 1e-6 * single("fp8_delayed")[0])


def test_data_parallel__recipe_none__losses_equal_those_of_one_device():
    expected, actual = single("none")[0], parallel("none")[0]
    assert expected[-1] != expected[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_data_parallel__fp8_first_loss__equals_that_of_one_device():
    np.testing.assert_allclose(
        parallel("fp8_delayed")[0][0], single("fp8_delayed")[0][0], rtol=1e-6
    )


def test_data_parallel__fp8_later_losses__are_within_three_noise_floors():
    difference = np.abs(parallel("fp8_delayed")[0] - single("fp8_delayed")[0])
    assert (difference <= 3 * noise_floor()).all(), difference / noise_floor()


def test_data_parallel__scaling_state_after_one_step__is_that_of_one_device():
    assert_same_scaling(parallel("fp8_delayed")[1], single("fp8_delayed")[1], times_rhs=DEVICES)


def collectives(jaxpr) -> collections.Counter:
    """Collectives in a jaxpr and everything inside it; operands of each counted too."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith(("psum", "pmax", "pmin", "all_", "ppermute", "reduce_scatter")):
            counts[name.removesuffix("_invariant")] += 1
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                counts += collectives(inner)
    return counts


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_data_parallel__a_step__has_one_pmax_for_all_amaxes(micro_batches):
    config = config_of("fp8_delayed", DEVICES, accumulate=micro_batches)
    state = placed(config, host_start("fp8_delayed"))
    step = step_of(config, state)
    found = collectives(jax.make_jaxpr(step)(state, put_batch(config, 1)).jaxpr)
    # JAX writes one psum for each leaf of a tree: gradients and loss; token count; health counts.
    assert found == {"pmax": 1, "psum": len(jax.tree.leaves(state.params)) + 1 + 1 + 1}


def test_data_parallel__the_compiled_step__merges_its_sums():
    """XLA makes one all-reduce of all psums that do not wait for another."""
    step = compiled_step("fp8_delayed", DEVICES)[1]
    found = re.findall(r" all-reduce(?:-start)?\(", step.as_text())
    assert len(found) == 3  # the token count; gradients, loss and counts; the amaxes


def test_data_parallel__micro_batches__keep_loss_and_scaling_state():
    """Two micro-batches of one window on each of eight devices."""
    config = config_of("fp8_delayed", DEVICES, accumulate=2)
    state, batch = placed(config, host_start("fp8_delayed")), put_batch(config, 1)
    state, metrics = compiled(step_of(config, state), state, batch)(state, batch)
    np.testing.assert_allclose(metrics.loss, single("fp8_delayed")[0][0], rtol=1e-6)
    expected = single("fp8_delayed")[1]
    assert_same_scaling(state.scaling, expected, times_rhs=2 * DEVICES)
