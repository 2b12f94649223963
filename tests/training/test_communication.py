"""What a step sends, as executed by the compiled program; and that sharded gradients are right.

Twelve scanned layers of four linear layers on 8 devices. The counts are those of the program, not
of its text: a collective in the scan counts once for each layer.
"""

import collections
import functools

import jax
import numpy as np
import pytest

from lowprec_jax import ops
from lowprec_jax.training.communication import communication_report, lower_step
from lowprec_jax.training.step import build_gradients
from training.helpers import VOCAB, batch_of, by_path, network_of, start, tiny_config

DEVICES, LAYERS, SITES = 8, 12, 12 * 4
OPTIONS = {"xla_backend_optimization_level": 0}  # the collectives stay the same


def deep_config(recipe, *, fsdp=1, strategy="shard_map", reduce="float32", **model):
    sizes = {"num_layers": LAYERS, "num_heads": 1, "width": 32, "mlp_width": 64, "context": 8}
    mesh = {"data": DEVICES // fsdp, "fsdp": fsdp, "strategy": strategy, "reduce": reduce}
    return tiny_config(recipe=recipe, model={**sizes, **model}, mesh=mesh)


@functools.cache
def lowered(config):
    return lower_step(config, VOCAB)


@functools.cache
def executed(config):
    return ops.collectives(lowered(config).compile(compiler_options=OPTIONS))


def counts(found):
    total = collections.Counter()
    for c in found:
        total[c.kind, c.dtype] += c.executed
    return total


# Strategy and recipe: how often a step executes each collective.
#
# Under shard_map: the token count; the gradients, with the loss and the counts of all layers; with
# delayed scaling the amaxes of all layers. Current scaling needs the amax of the operands of a
# matmul before it, once forward and once backward: 2 for each of 48 layers.
#
# Under jit the compiler sums the gradients of a layer in the scan (12 + 2), and partitions each
# amax, a reduction of two results, by gathering the partial ones (s32: magnitudes, NaN flags).
EXECUTED = {
    ("shard_map", "none"): {("all-reduce", "f32"): 2},
    ("shard_map", "fp8_delayed"): {("all-reduce", "f32"): 3},
    ("shard_map", "fp8_current"): {("all-reduce", "f32"): 3 + 2 * SITES},
    ("jit", "none"): {("all-reduce", "f32"): 14},
    ("jit", "fp8_delayed"): {("all-reduce", "f32"): 14, ("all-gather", "s32"): 8 * SITES},
    ("jit", "fp8_current"): {("all-reduce", "f32"): 14, ("all-gather", "s32"): 12 * SITES},
}


@pytest.mark.parametrize(("strategy", "recipe"), EXECUTED)
def test_collectives__data_parallel__are_executed_as_often_as_stated(strategy, recipe):
    found = executed(deep_config(recipe, strategy=strategy))
    assert counts(found) == EXECUTED[strategy, recipe]
    assert all(c.exact for c in found)


def test_collectives__delayed_scaling__adds_one_all_reduce_of_all_amaxes():
    plain, fp8 = (executed(deep_config(recipe)) for recipe in ("none", "fp8_delayed"))
    assert len(fp8) == len(plain) + 1
    assert {c.kind for c in (*plain, *fp8)} == {"all-reduce"}
    # Three operands of each layer: their amaxes alone, their four counts with the gradients.
    assert [x.shape for c in fp8 for x in c.operands].count((3 * SITES,)) == 1
    assert [len(c.operands) for c in fp8 if c.operands[0].shape == (3 * SITES,)] == [1]
    added = sum(c.payload_bytes for c in fp8) - sum(c.payload_bytes for c in plain)
    assert added == 3 * SITES * (1 + 4) * 4
    (gradients,) = (c for c in fp8 if len(c.operands) > 1)
    assert (3 * SITES, 4) in {x.shape for x in gradients.operands}


def gathers(found):
    """How often each all-gather runs, by type and shape of what it gives."""
    total = collections.Counter()
    for c in found:
        if c.kind == "all-gather":
            total[c.results[0].dtype, c.results[0].shape] += c.executed
    return total


def test_collectives__fsdp__kernels_travel_as_uint8_in_half_the_bytes_of_bf16():
    plain, fp8 = (deep_config(r, fsdp=8, compute_dtype="bfloat16") for r in ("none", "fp8_delayed"))
    embedding = {("f32", (VOCAB, 32)): 1}  # the only one in high precision; norms are not sharded
    shapes = [(32, 96), (32, 32), (32, 2, 64), (64, 32)]
    # Forward and once more backward.
    expected = {("u8", shape): 2 * LAYERS for shape in shapes}
    found = executed(fp8)
    assert gathers(found) == {**expected, **embedding}
    # XLA:CPU has widened the baseline's bf16 to f32.
    baseline = ops.stablehlo_collectives(lowered(plain))
    assert gathers(baseline) == {**{("bf16", s): 2 * LAYERS for s in shapes}, **embedding}

    def kernel_bytes(found, dtype):
        return sum(c.payload_bytes for c in found if (c.kind, c.dtype) == ("all-gather", dtype))

    assert kernel_bytes(found, "u8") <= 0.52 * kernel_bytes(baseline, "bf16")


def test_collectives__fsdp_with_a_head_of_its_own__gathers_it_in_the_compute_type():
    config = deep_config("fp8_delayed", fsdp=8, compute_dtype="bfloat16", tied_head=False)
    found = gathers(ops.stablehlo_collectives(lowered(config)))
    high = {key: n for key, n in found.items() if key[0] != "u8"}
    assert high == {("f32", (VOCAB, 32)): 1, ("bf16", (32, VOCAB)): 2}


def sharded_config(recipe, fsdp=1, reduce="float32"):
    return tiny_config(recipe=recipe, mesh={"fsdp": fsdp, "reduce": reduce})


@functools.cache
def host_start(recipe):
    return jax.device_get(start(sharded_config(recipe)))


@functools.cache
def gradient_program(config):
    """Lowered, compiled, and its arguments."""
    network, state = network_of(config), host_start(config.precision.recipe)
    state = jax.device_put(state, network.layout.shardings(state))
    batch = network.layout.put_batch(batch_of(config, 1))
    args = state.params, (state.scaling, state.reduction), batch
    program = network.layout.jit(build_gradients(network)).lower(*args)
    return program, program.compile(compiler_options=OPTIONS), args


def gradients(config, change=lambda params: params):
    """The gradient of every parameter, by path, float64."""
    _, program, (params, others, batch) = gradient_program(config)
    _, grads, _ = jax.block_until_ready(program(change(params), others, batch))
    return {path: grad.astype(np.float64) for path, grad in by_path(grads).items()}


def relative(actual, expected):
    """Relative distance in the Frobenius norm, by path."""
    assert actual.keys() == expected.keys()
    norm = np.linalg.norm
    return {p: norm(actual[p] - x) / norm(x) for p, x in expected.items()}


def perturbed(seed):
    """Multiplies weights by ``1 + 1e-7 * N(0, 1)``: less than a unit in the last place of f32."""
    rng = np.random.default_rng(seed)

    def perturb(params):
        noisy = lambda x: x * (1 + 1e-7 * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
        return jax.tree.map(noisy, params)

    return perturb


@functools.cache
def noise_floor():
    """What such a change of the weights does to each FP8 gradient on one device: most of five.

    Where it flips no code, f32 rounding is left, for which 1e-6 is allowed.
    """
    config = sharded_config("fp8_delayed")
    exact = gradients(config)
    runs = [relative(gradients(config, perturbed(seed)), exact) for seed in range(5)]
    return {path: max(1e-6, *(run[path] for run in runs)) for path in exact}


def test_gradients__fsdp_and_recipe_none__are_those_of_one_device():
    found = relative(gradients(sharded_config("none", 8)), gradients(sharded_config("none")))
    assert max(found.values()) < 1e-5, found


def test_gradients__fsdp_and_fp8__are_those_of_one_device_within_the_noise():
    expected = gradients(sharded_config("fp8_delayed"))
    found = relative(gradients(sharded_config("fp8_delayed", 8)), expected)
    assert {path: x for path, x in found.items() if x > 3 * noise_floor()[path]} == {}


@pytest.mark.parametrize("recipe", ["none", "fp8_delayed"])
def test_gradients__fsdp_summed_in_bf16__differ_by_its_rounding(recipe):
    config = sharded_config(recipe, 8, "bfloat16")
    scatters = [
        c
        for c in ops.stablehlo_collectives(gradient_program(config)[0])
        if c.kind == "reduce-scatter"
    ]
    assert {c.dtype for c in scatters} == {"bf16"}
    found = relative(gradients(config), gradients(sharded_config(recipe, 8)))
    # Half a step is 2**-9, of each part and of the sum. Measured: 0.0018 to 0.0028.
    assert max(found.values()) < 2**-8, found
    assert min(found.values()) > 2**-12, found


def test_communication_report__emulated_devices__shows_both_tables():
    config = tiny_config(recipe="fp8_delayed", name="mine", model={"num_layers": 1}, devices=2)
    shown = communication_report(config)
    assert "mine: one training step, recipe fp8_delayed, data 2 x fsdp 1 x tensor 1" in shown
    compiled, written = shown.split("StableHLO")
    assert "all-reduce  f32           3" in compiled
    assert "all-reduce  f32          12" in written
