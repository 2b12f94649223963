"""Time and bytes of a layer under recipes, against numbers by hand."""

import dataclasses
import math

import numpy as np
import pytest

from lowprec_jax.recipes import NONE, get_recipe, translate
from lowprec_jax.roofline.chips import get_chip
from lowprec_jax.roofline.gemm import Rates, Shape, gemm_cost
from lowprec_jax.roofline.layer import (
    LayerWork,
    break_even_square,
    break_even_tokens,
    layer_cost,
    verdict,
)

H200 = Rates(get_chip("h200"))
N = 8192
PRODUCT = 2.0 * N**3
BANDWIDTH = 0.8 * 4.8e12


def layer(recipe, shape=(N, N, N), *, chip="h200", **changes):
    translated = translate(recipe, str(get_chip(chip).target)).recipe
    return LayerWork("mlp/up", Shape(*shape), 1, translated, **changes)


def test_layer_cost__h200_bf16__is_that_of_the_data_sheet():
    cost = layer_cost(layer("none"), H200)
    # f32 weights are read and written in bf16 before the products.
    seconds = 3 * PRODUCT / (0.7 * 989.4e12) + N**2 * (4 + 2) / BANDWIDTH
    np.testing.assert_allclose(cost.total.seconds, seconds, rtol=1e-12)
    # Operands and results in bf16, the gradient of the weights in f32.
    assert cost.total.bytes == N**2 * ((2 + 2 + 2) * 2 + (2 + 2 + 4) + 6)
    assert cost.total.flops == 3 * PRODUCT


def test_layer_cost__h200_fp8_delayed__adds_one_read_and_two_writes_of_each_operand():
    cost = layer_cost(layer("fp8_delayed"), H200)
    casts = N**2 * ((2 + 1 + 1) + (4 + 1 + 1) + (2 + 1 + 1))
    np.testing.assert_allclose(cost.casts.seconds, casts / BANDWIDTH, rtol=1e-12)
    seconds = 3 * PRODUCT / (0.7 * 1978.9e12) + casts / BANDWIDTH
    np.testing.assert_allclose(cost.total.seconds, seconds, rtol=1e-12)
    assert cost.total.bytes == N**2 * ((1 + 1 + 2) * 2 + (1 + 1 + 4)) + casts


def test_layer_cost__current_scaling__reads_every_operand_once_more():
    delayed, current = (layer_cost(layer(r), H200).casts for r in ("fp8_delayed", "fp8_current"))
    assert current.bytes - delayed.bytes == N**2 * (2 + 4 + 2)


def test_layer_cost__rows_and_blocks__need_no_amax_pass_but_write_scales():
    rows, blocks = (layer_cost(layer(r), H200).casts.bytes for r in ("fp8_rowwise", "fp8_block"))
    assert rows == layer_cost(layer("fp8_delayed"), H200).casts.bytes
    # f32 scales of 1 x 128 for two forms of two operands, of 128 x 128 for the weights.
    assert blocks - rows == 4 * N**2 * (4 / 128) + 2 * N**2 * 4 / 128**2


def test_layer_cost__high_precision_wgrad__costs_what_bf16_does():
    partly = layer_cost(layer("fp8_rowwise_hp_wgrad"), H200)
    assert partly.gemms["wgrad"] == layer_cost(layer("none"), H200).gemms["wgrad"]
    assert partly.gemms["fwd"] == layer_cost(layer("fp8_rowwise"), H200).gemms["fwd"]


def test_layer_cost__mx_on_hopper__dequantizes_at_the_rate_of_bf16():
    work = layer("mxfp8")
    low, high = layer_cost(work, H200), layer_cost(work, H200, NONE)
    read_and_written = 3 * 2 * N**2 * (1 + 2)
    low_gemms, high_gemms = (sum(c.seconds for c in x.gemms.values()) for x in (low, high))
    np.testing.assert_allclose(low_gemms - high_gemms, read_and_written / BANDWIDTH, rtol=1e-9)
    assert verdict(work, low.total, high.total, H200).startswith("keep high: h200 does not")


@pytest.mark.parametrize(("recipe", "tflops"), [("mxfp8", 4500), ("nvfp4", 9000), ("w8a8", 4500)])
def test_layer_cost__blackwell__has_a_rate_for_each_width(recipe, tflops):
    b200 = Rates(get_chip("b200"))
    seconds = layer_cost(layer(recipe, chip="b200"), b200).gemms["fwd"].seconds
    np.testing.assert_allclose(seconds, PRODUCT / (0.7 * tflops * 1e12), rtol=1e-12)


def test_gemm_cost__few_tokens__is_bound_by_memory():
    cost = gemm_cost(Shape(16, N, N), 1, 1, 2, H200.flops(8), H200.bytes)
    assert cost.seconds == (16 * N + N * N + 2 * 16 * N) / BANDWIDTH
    assert cost.seconds > 2 * 16 * N * N / (0.7 * 1978.9e12)


def said(recipe, chip="h200", shape=(N, N, N)):
    work, rates = layer(recipe, shape, chip=chip, reason="rule 'x'"), Rates(get_chip(chip))
    low, high = layer_cost(work, rates).total, layer_cost(work, rates, NONE).total
    return verdict(work, low, high, rates)


def test_verdict__large_and_small_layers__differ():
    assert said("fp8_delayed").startswith("pays 1.85x")
    assert said("fp8_current", shape=(256, 256, 256)).startswith("keep high: 0.")
    assert "casts cost what the GEMMs save" in said("fp8_current", shape=(256, 256, 256))


def test_verdict__no_faster_units__says_so():
    assert "no faster than bf16" in said("fp8_delayed", "tpu-v6e")
    assert said("none") == "stays high: rule 'x'"
    assert said("fp8_delayed", "cpu") == "keep high: cpu does not multiply these codes"


@pytest.mark.parametrize("recipe", ["fp8_delayed", "fp8_current", "fp8_block"])
def test_break_even_square__below_it__bf16_is_as_fast(recipe):
    work = layer(recipe)

    def gain(n):
        there = dataclasses.replace(work, shape=Shape(n, n, n))
        return layer_cost(there, H200, NONE).total.seconds / layer_cost(there, H200).total.seconds

    found = break_even_square(work, H200)
    assert found is not None
    sizes = range(16, 2 * found, 16)
    assert found == next(n for n in sizes if gain(n) > 1)
    assert 256 < found < 4096


def test_break_even_tokens__below_it__bf16_is_as_fast():
    work = layer("fp8_current", (16, 512, 512))

    def gain(m):
        there = dataclasses.replace(work, shape=Shape(m, 512, 512))
        return layer_cost(there, H200, NONE).total.seconds / layer_cost(there, H200).total.seconds

    found = break_even_tokens(work, H200)
    assert found is None or (gain(found) > 1 >= gain(found - 16))


def test_break_even__a_chip_that_gains_nothing__never():
    assert break_even_square(layer("mxfp8"), H200) is None
    assert break_even_tokens(layer("mxfp8"), H200) is None


def test_layer_cost__unknown_rates__are_not_known():
    cost = layer_cost(layer("fp8_delayed", chip="cpu"), Rates(get_chip("cpu"))).total
    assert math.isnan(cost.seconds)
    assert cost.flops == 3 * PRODUCT
    assert get_recipe("none") is NONE
