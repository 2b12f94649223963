"""Gradients against a shadow in high precision: NumPy's SQNR, its layers, and on eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec_jax.recipes import Role
from lowprec_jax.training.shadow import build_shadow, sqnr_record
from lowprec_jax.training.step import build_gradients
from training.helpers import batch_of, by_path, network_of, start, tiny_config

FP8 = tiny_config()
FSDP = tiny_config(mesh={"data": 2, "fsdp": 4, "zero1": True})
# Half the time to compile; the arithmetic is the same.
QUICK = {"xla_backend_optimization_level": 0}


def high_precision(config):
    precision = dataclasses.replace(config.precision, recipe="none")
    return network_of(dataclasses.replace(config, precision=precision))


@functools.cache
def arguments(config):
    """Parameters, scaling state and batch, where the config wants them; the same for all."""
    layout = network_of(config).layout
    state = jax.device_get(start(FP8))
    state = jax.device_put(state, layout.shardings(state))
    return state.params, state.scaling, layout.put_batch(batch_of(FP8, 1))


@functools.cache
def shadow_of(config):
    compare = build_shadow(network_of(config), high_precision(config))
    return compare.lower(*arguments(config)).compile(compiler_options=QUICK)


@functools.cache
def plain(recipe: str):
    """Loss and gradients on one device, by path, without the shadow."""
    params, scaling, batch = arguments(FP8)
    network = network_of(FP8) if recipe == "fp8" else high_precision(FP8)
    args = params, (scaling if recipe == "fp8" else {}, {}), batch
    compute = network.layout.jit(build_gradients(network)).lower(*args)
    loss, grads, _ = compute.compile(compiler_options=QUICK)(*args)
    return float(loss), by_path(grads)


def numpy_sqnr(reference, approximation) -> dict[str, float]:
    """By parameter, those of blocks by layer, in float64."""
    found = {}
    for path, ref in reference.items():
        ref, x = np.float64(ref), np.float64(approximation[path])
        name = path.strip("[]'").replace("']['", "/")
        layers = {f"{name}[{i}]": i for i in range(len(ref))}
        for key, i in (layers if name.startswith("blocks") else {name: ...}).items():
            found[key] = 10 * np.log10((ref[i] ** 2).sum() / ((ref[i] - x[i]) ** 2).sum())
    return found


# On eight devices sums have another order, and a code in FP8 may round the other way.
@pytest.mark.parametrize(
    ("config", "decibels"), [(FP8, 1e-4), (FSDP, 0.05)], ids=["one device", "fsdp"]
)
def test_shadow__fp8__is_the_sqnr_of_numpy(config, decibels):
    params, scaling, batch = arguments(config)
    result = jax.block_until_ready(shadow_of(config)(params, scaling, batch))
    (loss, grads), (expected_loss, expected) = plain("fp8"), plain("none")
    record, wanted = sqnr_record(result.sqnr), numpy_sqnr(expected, grads)
    assert record == pytest.approx(wanted, abs=decibels)
    assert len(record) == 14  # two layers of four kernels and two norms; embedding; final norm
    linear = [v for k, v in record.items() if "kernel" in k]
    assert min(linear) > 15  # e4m3 and e5m2 leave about 21 dB
    assert max(linear) < 25
    # The difference of two losses of 3.4, each right to some units in the last place.
    np.testing.assert_allclose(result.loss_difference, loss - expected_loss, atol=3e-6)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, scaling)))


def test_shadow__bad_scale_in_one_layer__shows_in_that_layer():
    params, scaling, batch = arguments(FP8)
    healthy = sqnr_record(shadow_of(FP8)(params, scaling, batch).sqnr)
    site = scaling["blocks"]["mlp"]["down"]["dot_general"]["scaling"]
    scaling = jax.tree.map(lambda x: x, scaling)  # dicts of its own
    stuck = site["amax_history"].at[1, Role.LHS].multiply(2.0**18)
    scaling["blocks"]["mlp"]["down"]["dot_general"]["scaling"] = site | {"amax_history": stuck}
    record = sqnr_record(shadow_of(FP8)(params, scaling, batch).sqnr)
    assert healthy["blocks/mlp/down/kernel[1]"] - record["blocks/mlp/down/kernel[1]"] > 10
    assert abs(healthy["blocks/mlp/down/kernel[0]"] - record["blocks/mlp/down/kernel[0]"]) < 3


def test_shadow__layers_not_scanned__have_a_number_for_each_parameter():
    config = dataclasses.replace(FP8, model=dataclasses.replace(FP8.model, scan_layers=False))
    network = network_of(config)
    params, scaling = jax.eval_shape(network.init, jax.random.key(0))
    compare = build_shadow(network, high_precision(config), micro_batches=2)
    result = jax.eval_shape(compare, params, scaling, batch_of(config, 1))
    assert {x.shape for x in jax.tree.leaves(result)} == {()}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), result.sqnr)
    assert "blocks/1/mlp/down/kernel" in sqnr_record(zeros)


def test_shadow__explicit_shardings__can_be_summed():
    """Traced only: explicit axes refuse, when traced, what cannot be laid out."""
    config = tiny_config(mesh={"data": 2, "fsdp": 2, "tensor": 2, "strategy": "explicit"})
    compare = build_shadow(network_of(config), high_precision(config))
    result = jax.eval_shape(compare, *arguments(config))
    assert result.sqnr["blocks"]["mlp"]["down"]["kernel"].shape == (2,)
