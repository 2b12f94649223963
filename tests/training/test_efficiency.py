"""MFU with two peaks, goodput, peak memory."""

import contextlib
import dataclasses
import resource
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowprec_jax.errors import UserError
from lowprec_jax.models import Transformer, TransformerConfig
from lowprec_jax.nnx import plan
from lowprec_jax.ops.plan import find_matmuls
from lowprec_jax.training.efficiency import (
    Clock,
    StepFlops,
    ideal_seconds,
    peak_memory,
    peaks_of,
    step_flops,
)

MODEL = TransformerConfig(
    vocab_size=29,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    width=16,
    mlp_width=24,
    max_context=10,
)
BATCH = 5


def test_step_flops__by_hand__agree():
    """B 5, T 10, D 16, H 4, F 24, V 29; L 3."""
    tokens = 5 * 10
    qkv = np.zeros((16, 4 * (4 + 2 + 2)))
    kernels = (qkv, np.zeros((16, 16)), np.zeros((16, 2 * 24)), np.zeros((24, 16)))
    layers = 3 * tokens * sum(kernel.size for kernel in kernels)
    pairs = np.tril(np.ones((10, 10))).sum()
    attention = 3 * 5 * pairs * 4 * 4 * 2  # layers, windows, pairs, heads, size; scores and values
    head = tokens * 29 * 16
    # A multiply-add is 2; forward, and two products backward.
    assert step_flops(MODEL, BATCH, "fp8_current") == StepFlops(6 * layers, 6 * (attention + head))
    assert step_flops(MODEL, BATCH, "none") == StepFlops(0, 6 * (layers + attention + head))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp": "gelu", "num_kv_heads": 4},
        {"tied_head": False},
        {"scan_layers": False, "tied_head": False, "num_kv_heads": 1},
    ],
    ids=["tied", "gelu", "head", "unrolled"],
)
def test_step_flops__traced_model__agrees(changes):
    """Forward products of the real model, found in its program, times three."""
    config = dataclasses.replace(MODEL, **changes)
    rules = [("(.*/)?(gate_up|up|head)", "fp8_delayed")]
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((BATCH, config.max_context), jnp.int32)
    graphdef, state = nnx.split(model)
    traced = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, tokens)
    found = find_matmuls(traced)
    square = 2 * 2 * config.num_layers * BATCH * config.width * 10 * 10
    causal = square * (10 + 1) // (2 * 10)
    total = 3 * (sum(m.flops for m in found) - square + causal)
    flops = step_flops(config, BATCH, rules)
    assert flops.fp8 + flops.other == total
    share = plan(model, rules, tokens).quantized_share
    assert flops.fp8 == pytest.approx(3 * share * sum(m.flops for m in found), rel=1e-12)


def test_step_flops__recompute__does_not_count():
    for remat in ("full", "dots"):
        config = dataclasses.replace(MODEL, remat=remat)
        assert step_flops(config, BATCH, "none") == step_flops(MODEL, BATCH, "none")


def test_step_flops__high_precision_forward__counts_two_gemms_of_three():
    whole = step_flops(MODEL, BATCH, "fp8_delayed")
    partly = step_flops(MODEL, BATCH, "fp8_delayed_hp_forward")
    assert 3 * partly.fp8 == 2 * whole.fp8 > 0
    assert sum(partly) == sum(whole)


def test_step_flops__rule_that_matches_no_layer__is_refused():
    with pytest.raises(UserError, match="'nothing' matches no layer"):
        step_flops(MODEL, BATCH, [("nothing", "none")])


H200 = (989.4e12, 1978.9e12)


def test_ideal_seconds__two_peaks__by_hand():
    flops = StepFlops(fp8=4 * 10**15, other=10**15)
    expected = (4e15 / 1978.9e12 + 1e15 / 989.4e12) / 8
    assert ideal_seconds(flops, "NVIDIA H200", 8) == pytest.approx(expected, rel=1e-12)
    # Without FP8 units all are held to the one peak.
    assert ideal_seconds(flops, "TPU v5p", 2) == pytest.approx(5e15 / 459e12 / 2, rel=1e-12)


def test_ideal_seconds__unknown_device__is_not_known():
    flops = StepFlops(fp8=1, other=1)
    assert ideal_seconds(flops, jax.devices("cpu")[0].device_kind, 8) is None


@pytest.mark.parametrize(
    ("device_kind", "peaks"),
    [
        ("NVIDIA H100 80GB HBM3", H200),
        ("NVIDIA H200", H200),
        ("NVIDIA GH200 480GB", H200),
        ("NVIDIA H100 NVL", (835.5e12, 1670.5e12)),
        ("NVIDIA H100 PCIe", (756.5e12, 1513e12)),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA B200", (2250e12, 4500e12)),
        ("NVIDIA GB200", (2500e12, 5000e12)),
        ("NVIDIA A100-SXM4-80GB", (312e12, 312e12)),
        ("NVIDIA A100 80GB PCIe", (312e12, 312e12)),
        ("NVIDIA L40S", (362.05e12, 733e12)),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", (1307.4e12, 2614.9e12)),
        ("TPU v4", (275e12, 275e12)),
        ("TPU v4 lite", None),
        ("TPU v5 lite", (197e12, 197e12)),
        ("TPU v5e", (197e12, 197e12)),
        ("TPU v5", (459e12, 459e12)),
        ("TPU v6 lite", (918e12, 918e12)),
        ("TPU7x", (1153.5e12, 2307e12)),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks__kinds_of_device__are_told_apart(device_kind, peaks):
    found = peaks_of(device_kind)
    assert (found is None) == (peaks is None)
    if peaks:
        np.testing.assert_allclose(found, peaks, rtol=1e-12)


class Now:
    def __init__(self):
        self.seconds = 50.0

    def __call__(self):
        return self.seconds


def test_clock__activities__add_up_to_the_wall_time():
    now = Now()
    clock = Clock(now=now)
    now.seconds += 1
    with clock.measure("compile"):
        now.seconds += 2
    with clock.measure("step"):
        now.seconds += 4
        with clock.measure("data"):
            now.seconds += 8
        now.seconds += 16
        assert clock.seconds()["step"] == 20  # of an activity that goes on, too
        with contextlib.suppress(ValueError), clock.measure("evaluation"):
            now.seconds += 32
            raise ValueError("broken")
        now.seconds += 64
    now.seconds += 128
    seconds = {k: v for k, v in clock.seconds().items() if v}
    assert seconds == {"other": 129, "compile": 2, "step": 84, "data": 8, "evaluation": 32}
    assert clock.goodput == 84 / 255


def test_clock__lost_time__is_no_good():
    now = Now()
    clock = Clock("step", now=now)
    now.seconds += 10
    clock.lose(4)
    assert clock.seconds()["lost"] == 4
    assert clock.goodput == 0.6


def test_peak_memory__cpu__is_that_of_the_process():
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = peak_memory()
    assert memory.keys() == {"peak_process_bytes"}
    after = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert before <= memory["peak_process_bytes"] <= after


def test_peak_memory__devices_that_tell__the_fullest(monkeypatch):
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    stats = [{"peak_bytes_in_use": 5}, None, {"peak_bytes_in_use": 9}, {"bytes_in_use": 77}]
    monkeypatch.setattr(jax, "local_devices", lambda: [device(s) for s in stats])
    assert peak_memory() == {"peak_device_bytes": 9}
