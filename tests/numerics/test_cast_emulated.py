"""Formats whose codes have no type of their own: small floats, ExMy, integers, tables."""

from statistics import NormalDist

import gfloat
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

from lowprec_jax import numerics
from lowprec_jax.numerics import (
    NF4,
    CodebookFormat,
    FloatFormat,
    IntegerFormat,
    cast,
    cast_with_values,
    decode,
    exmy,
)

SMALL_FLOATS = [numerics.E2M1, numerics.E2M3, numerics.E3M2]
# Narrow, wide, 16 bits; a bias of its own at each end of the range.
WIDTHS = [(1, 2), (2, 0), (3, 5), (4, 3), (5, 9), (7, 8), (7, 0)]
EXMY = [exmy(*widths) for widths in WIDTHS] + [exmy(4, 3, bias=123), exmy(4, 3, bias=-89)]
INTEGERS = [f for f in numerics.formats() if isinstance(f, IntegerFormat)]
DYNAMIC = CodebookFormat(  # 255 values over five decades
    "dynamic", tuple(np.float32(np.sinh(np.linspace(-12, 12, 255)) / np.sinh(12)).tolist())
)
TABLES = [NF4, CodebookFormat("pair", (0.0, 0.75)), CodebookFormat("skew", (-3.0, -0.5, 1.0, 4.0))]
FORMATS = [*SMALL_FLOATS, *EXMY, *INTEGERS, *TABLES, DYNAMIC]
SOME = [f for f in FORMATS if f not in INTEGERS or f.bits in (2, 8, 9, 16)]
CAST = jax.jit(cast, static_argnums=1, static_argnames="rounding")
DECODE = jax.jit(decode, static_argnums=(1, 2))


def _magnitudes(fmt) -> np.ndarray:
    """f64 values of the codes without sign, or of all codes of a table; by formula."""
    if isinstance(fmt, FloatFormat):
        return oracles.float_magnitudes(fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)
    if isinstance(fmt, IntegerFormat):
        return np.arange(2 ** (fmt.bits - 1)) / 2.0**fmt.fraction_bits
    return np.array(fmt.values)


def _expected(x: np.ndarray, fmt) -> np.ndarray:
    """Codes by search in f64, as i64; NaN as documented."""
    grid, wide = _magnitudes(fmt), oracles.f64(x)
    if isinstance(fmt, CodebookFormat):
        zero = int(np.argmin(np.abs(grid)))
        return np.where(np.isnan(wide), zero, oracles.nearest(wide, grid))
    if isinstance(fmt, FloatFormat) and fmt.mantissa_bits == 0:  # ties go up, see `exmy`
        place = np.searchsorted((grid[:-1] + grid[1:]) / 2, np.abs(wide), side="right")
        place = np.where(np.abs(wide) <= grid[1] / 2, 0, place)
    else:
        place = oracles.nearest(np.abs(wide), grid)
    if isinstance(fmt, IntegerFormat):
        return np.where(np.isnan(wide), 0, np.where(wide < 0, -place, place))
    sign = 1 << (fmt.bits - 1)
    return np.where(np.isnan(wide), sign, place | np.where(np.signbit(x), sign, 0))


def _inputs(fmt) -> np.ndarray:
    """All f16 and bf16 values, ties of either sign with the f32 numbers beside them, specials."""
    ties = oracles.grid_ties(_magnitudes(fmt))
    sixteen_bit = [oracles.f32(oracles.all_codes(d)) for d in (np.float16, ml_dtypes.bfloat16)]
    return np.concatenate([*sixteen_bit, ties, -ties, oracles.special_values()])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_cast__every_16_bit_value_and_every_tie__is_the_nearest_code(fmt):
    x = _inputs(fmt)

    codes = CAST(jnp.asarray(x), fmt)

    assert codes.dtype == fmt.dtype
    np.testing.assert_array_equal(np.asarray(codes).astype(np.int64), _expected(x, fmt))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("fmt", [numerics.E2M1, numerics.INT8, NF4], ids=str)
def test_cast__16_bit_input_without_jit__is_the_nearest_code(fmt, dtype):
    x = oracles.all_codes(dtype)

    codes = cast(jnp.asarray(x), fmt)

    np.testing.assert_array_equal(
        np.asarray(codes).astype(np.int64), _expected(oracles.f32(x), fmt)
    )


@pytest.mark.parametrize("fmt", [*SMALL_FLOATS, *EXMY[2:6], *INTEGERS[2::4], *TABLES], ids=str)
def test_cast__a_million_mixed_magnitudes__is_the_nearest_code(fmt):
    x = oracles.mixed_magnitudes(fmt.min_subnormal, fmt.max)

    codes = CAST(jnp.asarray(x), fmt)

    np.testing.assert_array_equal(np.asarray(codes).astype(np.int64), _expected(x, fmt))


@pytest.mark.parametrize("fmt", SMALL_FLOATS, ids=str)
def test_cast__small_floats__equals_ml_dtypes_and_gfloat(fmt):
    x = _inputs(fmt)
    number = ~np.isnan(x)

    codes = np.asarray(CAST(jnp.asarray(x), fmt))

    dtype = oracles.ML_DTYPES[fmt.name]
    positive_nan = number | ~np.signbit(x)  # ml_dtypes turns the sign of NaN around
    expected = oracles.plain_cast(x, dtype).view(np.uint8)
    np.testing.assert_array_equal(codes[positive_nan], expected[positive_nan])
    np.testing.assert_array_equal(codes[number], oracles.gfloat_cast(x[number], fmt.name))


@pytest.mark.parametrize("fmt", [f for f in EXMY if f.mantissa_bits > 0], ids=str)
def test_cast__exmy__equals_gfloat(fmt):
    x = _inputs(fmt)[65536:]  # all of bf16, the ties
    x = x[~np.isnan(x)]
    info = oracles.gfloat_info(fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)

    codes = np.asarray(CAST(jnp.asarray(x), fmt))

    np.testing.assert_array_equal(codes, oracles.gfloat_cast(x, info))


def _codes_and_values(fmt) -> tuple[np.ndarray, np.ndarray]:
    """Every code that a cast produces, and its f64 value by formula."""
    values = _magnitudes(fmt)
    codes = np.arange(len(values))
    if isinstance(fmt, FloatFormat):
        codes, values = np.r_[codes, codes + len(values)], np.r_[values, -values]
    elif isinstance(fmt, IntegerFormat):
        codes, values = np.r_[codes, -codes], np.r_[values, -values] + 0.0  # there is no -0
    return codes.astype(fmt.dtype), values


@pytest.mark.parametrize("fmt", SOME, ids=str)
def test_decode__every_code__is_the_value_by_formula(fmt):
    codes, values = _codes_and_values(fmt)

    decoded = DECODE(jnp.asarray(codes), fmt, jnp.float32)

    oracles.assert_same_bits(decoded, values.astype(np.float32))


@pytest.mark.parametrize("fmt", SMALL_FLOATS, ids=str)
def test_decode__small_floats__equals_ml_dtypes_and_gfloat(fmt):
    codes = np.arange(2**fmt.bits, dtype=np.uint8)

    decoded = DECODE(jnp.asarray(codes), fmt, jnp.float32)

    oracles.assert_same_bits(decoded, oracles.f32(codes.view(oracles.ML_DTYPES[fmt.name])))
    by_gfloat = gfloat.decode_ndarray(oracles.GFLOAT_FORMATS[fmt.name], codes.astype(np.uint64))
    oracles.assert_same_bits(decoded, by_gfloat.astype(np.float32))


@pytest.mark.parametrize("fmt", SOME, ids=str)
def test_decode__to_bf16__is_exact_where_the_format_says_so(fmt):
    codes, values = _codes_and_values(fmt)

    narrow = oracles.f64(DECODE(jnp.asarray(codes), fmt, jnp.bfloat16))

    assert (narrow == values).all() == fmt.exact_in_bf16


@pytest.mark.parametrize(
    ("fmt", "dtype"), [(numerics.E2M1, jnp.float4_e2m1fn), (numerics.INT4, jnp.int4)], ids=str
)
def test_decode__codes_in_the_native_type__have_the_same_values(fmt, dtype):
    values = [-6.0, -1.0, 0.0, 2.0, 4.0]

    decoded = decode(jnp.array(values, dtype), fmt)

    np.testing.assert_array_equal(decoded, np.float32(values))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float32, jnp.float8_e4m3fn], ids=str)
def test_decode__codes_of_another_type__raises_and_names_both(dtype):
    with pytest.raises(TypeError, match=rf"codes of e2m1 are uint8, given: {jnp.dtype(dtype)}"):
        decode(jnp.zeros(3, dtype), numerics.E2M1)


def test_nf4__values__are_the_quantiles_of_the_paper():
    """Appendix E: evenly spaced quantiles of N(0, 1), 8 positive and 7 negative, zero between."""
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(0.9677083, 0.5, 8)[:-1])
    expected = np.sort(np.r_[positive, 0.0, negative]) / positive.max()

    np.testing.assert_allclose(NF4.values, expected, atol=1e-6)


STOCHASTIC_COUNT = 2**15
# Inside, near and below the smallest step, and beyond the range; for a table inside gaps.
STOCHASTIC = {
    numerics.E4M3FN: [1.03, 1.3 * 2**-7, 1.4 * 2**-9, 0.3 * 2**-9, 447.9],
    numerics.E2M1: [1.1, 0.3, 0.1, 3.3, -5.3, 6.9],
    numerics.E3M2: [1.1, 0.3 / 16, 0.1, 25.0, -27.9],
    numerics.INT4: [0.3, -0.7, 2.5, 6.9, -6.1, 7.4],
    numerics.INT8: [0.3, 100.5, -126.9],
    numerics.MXINT8: [0.3 / 64, 1.01, -1.98],
    NF4: [0.05, -0.06, 0.5, 0.9, -0.99, 1.5],
    exmy(5, 9): [1.0003, 0.3 * 2**-23],
}


@pytest.mark.parametrize("fmt", STOCHASTIC, ids=str)
def test_cast__stochastic__is_unbiased_and_one_of_two_neighbours(fmt):
    count, grid = STOCHASTIC_COUNT, _all_values(fmt)
    x = np.float32(STOCHASTIC[fmt])[:, None]

    # For x of 0.3 steps the bound below is two standard deviations: one key in twenty fails. The
    # numbers themselves are tested in test_uniform.py.
    codes = CAST(
        jnp.asarray(np.repeat(x, count, axis=1)), fmt, rounding="stochastic", key=jax.random.key(0)
    )

    inside = np.clip(oracles.f64(x)[:, 0], grid[0], grid[-1])
    for wanted, values in zip(inside, oracles.f64(DECODE(codes, fmt, jnp.float32)), strict=True):
        assert set(np.unique(values)) == {grid[grid <= wanted][-1], grid[grid >= wanted][0]}
        assert abs(values.mean() / wanted - 1) < 3 / np.sqrt(count), wanted


@pytest.mark.parametrize("fmt", [numerics.E2M1, numerics.INT4, NF4, exmy(5, 9)], ids=str)
def test_cast__stochastic_of_format_values__changes_nothing_and_saturates(fmt):
    grid = _all_values(fmt)
    shape = (len(STOCHASTIC[fmt]), STOCHASTIC_COUNT)  # shares a program with the test above
    x = np.resize(np.float32([*grid, 1e30, -1e30, np.inf, -np.inf, np.nan]), shape)

    codes = CAST(jnp.asarray(x), fmt, rounding="stochastic", key=jax.random.key(6))

    expected = np.resize(np.r_[grid, [grid[-1], grid[0]] * 2, 0], shape)
    np.testing.assert_array_equal(oracles.f64(DECODE(codes, fmt, jnp.float32)), expected)


@pytest.mark.parametrize("fmt", [numerics.E2M1, NF4], ids=str)
def test_cast__stochastic_key__decides_the_result(fmt):
    x = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (64, 32)).astype(np.float32))

    first, again, other = (
        np.asarray(CAST(x, fmt, rounding="stochastic", key=jax.random.key(s))) for s in (4, 4, 5)
    )

    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.2


def _all_values(fmt) -> np.ndarray:
    """f64, sorted; for e4m3fn without its NaN."""
    magnitudes = _magnitudes(fmt)
    if fmt is numerics.E4M3FN:
        magnitudes = magnitudes[:-1]
    return (
        magnitudes if isinstance(fmt, CodebookFormat) else np.unique(np.r_[-magnitudes, magnitudes])
    )


@pytest.mark.parametrize("fmt", SOME, ids=str)
def test_underflow_bound__nearest__is_the_last_magnitude_that_is_zero_with_either_sign(fmt):
    bound = np.float32(fmt.underflow_bound)
    beyond = np.nextafter(bound, np.float32(np.inf)) if bound else np.float32(2.0**-126)

    values = DECODE(CAST(jnp.array([bound, -bound, beyond, -beyond]), fmt), fmt, jnp.float32)

    within, above = np.split(np.asarray(values), 2)
    unsigned_or_no_zero = min(_all_values(fmt)) == 0 or 0 not in _all_values(fmt)
    assert unsigned_or_no_zero or (within == 0).all()
    assert (above != 0).any()


@pytest.mark.parametrize("fmt", [*SMALL_FLOATS, *EXMY], ids=str)
def test_overflow_bound__floats__is_the_last_f32_nearer_to_max_than_to_the_next_step(fmt):
    step = _magnitudes(fmt)[-1] - _magnitudes(fmt)[-2]
    if fmt.mantissa_bits == 0:
        step = _magnitudes(fmt)[-1]  # the next power of two
    tie = _magnitudes(fmt)[-1] + step / 2

    # The largest mantissa is odd, so the tie itself goes to the next, even one.
    assert fmt.overflow_bound == np.nextafter(np.float32(tie), np.float32(0))


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_overflow_bound__integers__every_amax_under_its_own_scale_is_in_range(fmt):
    amax = oracles.mixed_magnitudes(1e-30, 1e30, 2**14)
    amax = np.abs(amax[np.isfinite(amax) & (np.abs(amax) > 1e-30)])

    scale = amax * (np.float32(1) / np.float32(fmt.scale_max))
    largest = (amax * (np.float32(1) / scale)).max()

    assert fmt.scale_max * (1 - 2**-22) <= largest <= fmt.overflow_bound
    assert fmt.overflow_bound < fmt.scale_max + fmt.min_normal / 16


@pytest.mark.parametrize(
    ("name", "emax"),
    [("e4m3fn", 8), ("e5m2", 15), ("e2m3", 2), ("e3m2", 4), ("e2m1", 2), ("mxint8", 0)],
)
def test_max_exponent__mx_element_types__is_that_of_the_specification(name, emax):
    assert numerics.get_format(name).max_exponent == emax


@pytest.mark.parametrize(
    ("name", "scale_max"), [("int8", 127.5), ("int4", 7.5), ("mxint8", 127.5 / 64), ("e2m1", 6.0)]
)
def test_scale_max__integers__is_half_a_step_more_than_the_largest(name, scale_max):
    assert numerics.get_format(name).scale_max == scale_max


@pytest.mark.parametrize(("bits", "fraction_bits"), [(1, 0), (17, 0), (8, -1), (8, 17)])
def test_integer_format__widths_out_of_range__raises(bits, fraction_bits):
    with pytest.raises(ValueError, match="use 2 to 16 bits and 0 to 16 fraction bits"):
        IntegerFormat("bad", bits, fraction_bits)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ((1.0,), "1 values; use 2 to 256"),
        ((0.0, 1.0, 0.5), "have to increase"),
        ((-1.0, 0.0), "up to a positive one"),
        ((0.0, 0.1), "normal f32 numbers"),
        ((0.0, 1e-40), "normal f32 numbers"),
        ((0.0, np.inf), "normal f32 numbers"),
    ],
)
def test_codebook_format__bad_table__raises(values, part):
    with pytest.raises(ValueError, match=part):
        CodebookFormat("bad", values)


@pytest.mark.parametrize(
    ("widths", "part"),
    [
        ((0, 3), "use 1 to 7 exponent bits"),
        ((8, 3), "use 1 to 7 exponent bits"),
        ((3, -1), "0 or more mantissa bits"),
        ((7, 9), "16 bits in all"),
        ((4, 3, 124), r"from 2\*\*-126 to .*The usual bias is 7"),
        ((4, 3, -90), r"binade of 2\*\*105"),
    ],
)
def test_exmy__widths_or_range_out_of_reach__raises(widths, part):
    with pytest.raises(ValueError, match=part):
        exmy(*widths)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("fmt", [*SOME, numerics.E4M3FN, numerics.E5M2], ids=str)
def test_cast_with_values__any_format__are_the_decoded_codes(fmt, rounding):
    limit = float(np.abs(_magnitudes(fmt)).max())
    x = np.random.default_rng(0).normal(size=4096) * limit / 2
    x = np.float32([*x, *x * 2.0**-20, 0.0, -0.0, np.nan, np.inf, -np.inf])

    codes, values = jax.jit(cast_with_values, static_argnums=1, static_argnames="rounding")(
        jnp.asarray(x), fmt, rounding=rounding, key=jax.random.key(1)
    )

    if isinstance(fmt, CodebookFormat):
        assert values is None
    else:
        np.testing.assert_array_equal(values, DECODE(codes, fmt, jnp.float32))
