"""Scales of blocks: every rule on a million amaxes against torchao and exact arithmetic."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

from lowprec_jax import numerics
from lowprec_jax.numerics import (
    E8M0_RULES,
    e8m0_code,
    e8m0_value,
    nvfp4_scales,
    scale_down,
    scale_up,
)
from lowprec_jax.numerics.block_scales import divide

# name: (largest value, exponent of it), from OCP MX 1.0, tables 1 to 5.
MX_ELEMENTS = {
    "e4m3fn": (448.0, 8),
    "e5m2": (57344.0, 15),
    "e2m3": (7.5, 2),
    "e3m2": (28.0, 4),
    "e2m1": (6.0, 2),
    "mxint8": (127 / 64, 0),
}
MANTISSA = {"e4m3fn": 3, "e5m2": 2, "e2m3": 3, "e3m2": 2, "e2m1": 1, "mxint8": 6}
MODES = {"eager": e8m0_code, "jit": jax.jit(e8m0_code, static_argnums=(1, 2))}


@functools.cache
def amaxes() -> np.ndarray:
    """f32 >= 0: random bits of every binade, the edges of every rule, and what is special."""
    random = np.random.default_rng(0).integers(0, 0x7F800000, 2**20, np.uint32).view(np.float32)
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    tops = [1.0, 1.5, 1.75, 1.875, 127 / 64, 1.25, 1 + 2**-7, 2 - 2**-5]
    edges = np.concatenate([powers * np.float32(top) for top in tops])
    bits = edges.view(np.uint32)[:, None] + np.arange(-4, 5).astype(np.uint32)
    near = bits.ravel().view(np.float32)
    subnormal = np.arange(2**12, dtype=np.uint32).view(np.float32)
    special = np.array([0, 3e38, 3.4028235e38, 1e-40, np.inf, np.nan], np.float32)
    amax = np.concatenate([special, subnormal, np.abs(near[near < np.inf]), random])
    return amax[: amax.size // 2 * 2]  # torchao packs pairs


def exact_code(amax: np.ndarray, name: str, rule: str) -> np.ndarray:
    """By frexp, which is exact, and one IEEE division in f32."""
    largest, emax = MX_ELEMENTS[name]
    value = amax.astype(np.float64)
    if rule == "rceil":
        with np.errstate(all="ignore"):
            value = (amax / np.float32(largest)).astype(np.float64)
        emax = 0
    elif rule == "ceil":  # by the exponent field: a subnormal counts as the next normal number
        value = np.where((value > 0) & (value < 2.0**-126), 2.0**-126, value)
    elif rule == "even":
        _, exponent = np.frexp(value)
        step = np.ldexp(1.0, np.maximum(exponent - 1, -126) - MANTISSA[name])
        with np.errstate(invalid="ignore"):  # half a step up, then floor: ties go up
            value = np.where(np.isfinite(value), np.floor(value / step + 0.5) * step, value)
    fraction, exponent = np.frexp(value)
    exponent = exponent - 1 + ((fraction > 0.5) if rule in ("ceil", "rceil") else 0)
    code = np.where(value == 0, 0, np.clip(exponent - emax + 127, 0, 254))
    infinite = 254 if rule == "rceil" else min(255 - emax, 254)
    return np.where(np.isnan(amax), 255, np.where(amax == np.inf, infinite, code)).astype(np.uint8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_e8m0_code__a_million_amaxes__is_the_exact_rule(name, rule, mode):
    codes = MODES[mode](jnp.asarray(amaxes()), numerics.get_format(name), rule)

    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, exact_code(amaxes(), name, rule))


@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("name", [n for n in MX_ELEMENTS if n != "mxint8"])
def test_e8m0_code__a_million_amaxes__equals_torchao(name, rule):
    codes = MODES["jit"](jnp.asarray(amaxes()), numerics.get_format(name), rule)

    expected, _ = oracles.torchao_mx(amaxes(), name, rule, block=1)
    comparable = np.ones(amaxes().shape, bool)
    if rule == "rceil":
        # torchao's log2 rounds to a whole number just above a power of two.
        with np.errstate(all="ignore"):
            fraction, _ = np.frexp(amaxes() / np.float32(MX_ELEMENTS[name][0]))
        comparable = ~((fraction > 0.5) & (fraction < 0.5 + 2**-17))
        assert comparable.mean() > 0.98
    np.testing.assert_array_equal(np.asarray(codes)[comparable], expected[comparable])


# Share of log-uniform amaxes beyond the largest element: log2(2**(emax + 1) / max).
@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("e4m3fn", "floor", np.log2(2 / 1.75)),
        ("e2m3", "floor", np.log2(2 / 1.875)),
        ("e2m1", "floor", np.log2(2 / 1.5)),
        ("e2m1", "even", np.log2(1.75 / 1.5)),
        ("e2m1", "ceil", 0),
        ("e2m1", "rceil", 0),
        ("e4m3fn", "ceil", 0),
        ("e4m3fn", "rceil", 0),
    ],
)
def test_e8m0_code__log_uniform_amaxes__saturate_as_often_as_the_rule_says(name, rule, expected):
    amax = np.exp2(np.random.default_rng(1).uniform(-20, 20, 2**18)).astype(np.float32)

    codes = MODES["jit"](jnp.asarray(amax), numerics.get_format(name), rule)

    scaled = np.ldexp(amax, 127 - np.asarray(codes).astype(np.int32))
    # 4 standard deviations of a share of 2**18 draws
    assert abs(np.mean(scaled > MX_ELEMENTS[name][0]) - expected) <= 4 * 0.5 / 2**9 * (expected > 0)


def test_e8m0_code__unknown_rule__names_those_there_are():
    with pytest.raises(ValueError, match="rule is 'round'; use one of floor, ceil, rceil, even"):
        e8m0_code(jnp.ones(1), numerics.E4M3FN, "round")


def test_e8m0_code__vmapped__is_elementwise():
    amax = jnp.asarray(amaxes()[:64].reshape(8, 8))

    codes = jax.vmap(lambda a: e8m0_code(a, numerics.E4M3FN, "rceil"))(amax)

    np.testing.assert_array_equal(codes, e8m0_code(amax, numerics.E4M3FN, "rceil"))


def test_e8m0_value__every_code__is_that_of_ml_dtypes_and_never_subnormal():
    codes = np.arange(256, dtype=np.uint8)

    values = np.asarray(jax.jit(e8m0_value)(jnp.asarray(codes)))

    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    expected[0] = 2.0**-126
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("function", "sign"), [(scale_down, -1), (scale_up, 1)])
def test_scale_by_code__random_bits__is_ldexp_rounded_once(function, sign, jit):
    rng = np.random.default_rng(2)
    random = rng.integers(0, 2**32, 2**18, np.uint32)
    subnormal = rng.integers(0, 2**23, 2**17, np.uint32) | (random[: 2**17] & 0x80000000)
    x = np.concatenate(
        [oracles.special_values(), subnormal.view(np.float32), random.view(np.float32)]
    )
    codes = rng.integers(0, 256, x.size).astype(np.uint8)

    scaled = (jax.jit(function) if jit else function)(jnp.asarray(x), jnp.asarray(codes))

    with np.errstate(all="ignore"):
        expected = np.ldexp(x.astype(np.float64), sign * (codes.astype(int) - 127))
        expected = np.where(codes == 255, np.nan, expected).astype(np.float32)
    oracles.assert_same_bits(scaled, expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_scale_down__sixteen_bit_input__is_exact_where_f32_is(dtype):
    x = oracles.all_codes(dtype)

    scaled = jax.jit(scale_down)(jnp.asarray(x), jnp.uint8(3))

    with np.errstate(all="ignore"):
        expected = np.ldexp(oracles.f64(x), 124).astype(np.float32)
    oracles.assert_same_bits(scaled, expected)


@pytest.mark.parametrize("jit", [False, True])
def test_divide__chains_and_constants__are_ieee_divisions(jit):
    """As compiled code, ``a / 6 / b`` differs from IEEE in 40 % of the cases."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(0x00800000, 0x7F800000, (2, 2**18), np.uint32).view(np.float32)

    def chain(a, b):
        return divide(a, b), divide(divide(a, jnp.float32(6)), b[0]), divide(jnp.float32(1), b)

    quotients = (jax.jit(chain) if jit else chain)(jnp.asarray(a), jnp.asarray(b))

    tiny = np.float32(2.0**-126)
    with np.errstate(all="ignore"):
        sixth = a / np.float32(6)
        sixth[sixth < tiny] = 0
        for quotient, expected in zip(quotients, (a / b, sixth / b[0], 1 / b), strict=True):
            expected = np.where(expected < tiny, 0, expected).astype(np.float32)
            np.testing.assert_array_equal(quotient, expected)


def test_divide__zeros_subnormals_and_not_finite__are_as_documented():
    a = jnp.array([0, 1e-40, 1, 1, jnp.inf, jnp.nan, 1, 3e38, 2.0**-126], jnp.float32)
    b = jnp.array([2, 1, jnp.inf, jnp.nan, 1, 1, 4, 0.5, 2], jnp.float32)

    quotients = jax.jit(divide)(a, b)

    expected = [0, 0, np.nan, np.nan, np.nan, np.nan, 0.25, np.inf, 0]
    np.testing.assert_array_equal(quotients, np.float32(expected))


def nvfp4_oracle(tile_amax, tensor_amax, element_max=6.0, scale_max=448.0, scale_min=2.0**-9):
    """arXiv:2509.25149 in NumPy f32 and `ml_dtypes`; nothing is flushed."""
    f = np.float32
    with np.errstate(all="ignore"):
        whole = np.maximum(f(tensor_amax) / f(scale_max * 6), f(2.0**-115))
        scale = np.clip(tile_amax / f(element_max) / whole, f(scale_min), f(448))
        return scale.astype(ml_dtypes.float8_e4m3fn).astype(f), whole


NVFP4_SCALES = jax.jit(nvfp4_scales, static_argnums=2, static_argnames=("element_max", "scale_max"))


@pytest.mark.parametrize(
    "options", [{}, {"element_max": 4.0, "scale_max": 256.0}, {"scale_min": 2.0**-6}], ids=str
)
@pytest.mark.parametrize("tensor_amax", [3e38, 1.0, 448 * 6, 1e-20, 1e-33, 1e-40, 0.0])
def test_nvfp4_scales__every_magnitude__is_the_published_recipe(tensor_amax, options):
    tile = np.minimum(amaxes()[np.isfinite(amaxes())], np.float32(tensor_amax))

    scale, whole = NVFP4_SCALES(
        jnp.asarray(tile), jnp.float32(tensor_amax), numerics.E2M1, **options
    )

    expected, expected_whole = nvfp4_oracle(tile, tensor_amax, **options)
    np.testing.assert_array_equal(whole, expected_whole)
    np.testing.assert_array_equal(scale, expected)
    assert whole.shape == ()
    assert scale.dtype == jnp.float32


@pytest.mark.parametrize("tensor_amax", [1.0, 3.0, 17.3, 1e-20])
def test_nvfp4_scales__amaxes_around_ties_of_e4m3__are_divided_as_by_ieee(tensor_amax):
    """Where an error of one ulp in a division shows: compiled f32 divisions fail this."""
    _, whole = nvfp4_oracle(np.zeros(1, np.float32), tensor_amax)
    ties = oracles.ties(ml_dtypes.float8_e4m3fn)
    tie = (ties[(ties > 2.0**-9) & (ties < 448)] * whole * np.float32(6)).view(np.uint32)
    tile = (tie[:, None] + np.arange(-8, 9).astype(np.uint32)).ravel().view(np.float32)

    scale, _ = NVFP4_SCALES(jnp.asarray(tile), jnp.float32(tensor_amax), numerics.E2M1)

    np.testing.assert_array_equal(scale, nvfp4_oracle(tile, tensor_amax)[0])


def test_nvfp4_scales__largest_tile__has_the_largest_scale_that_is_allowed():
    amax = jnp.array([3.0, 6.0])

    def scales(**options):
        return NVFP4_SCALES(amax, amax[1], numerics.E2M1, **options)[0].tolist()

    assert scales() == [224, 448]
    assert scales(scale_max=256.0) == [128, 256]
    assert scales(scale_max=256.0, element_max=4.0) == [192, 384]


def test_nvfp4_scales__amax_beyond_the_estimate__saturates():
    scale, _ = NVFP4_SCALES(jnp.array([1.0, 100.0, 3e38]), jnp.float32(1), numerics.E2M1)

    assert scale.tolist() == [448, 448, 448]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nvfp4_scales__tile_not_finite__has_scale_nan_alone(bad):
    scale, whole = NVFP4_SCALES(jnp.array([1.0, bad, 0.0]), jnp.float32(1), numerics.E2M1)

    np.testing.assert_array_equal(scale, [448, np.nan, 2.0**-9])
    assert np.isfinite(whole)
    everywhere, _ = NVFP4_SCALES(jnp.array([1.0, bad, 0.0]), jnp.float32(bad), numerics.E2M1)
    assert np.isnan(everywhere).all()
