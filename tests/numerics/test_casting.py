"""The cast to native floats: every 16-bit value and every tie, against three other libraries."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec_jax import numerics
from lowprec_jax.numerics import FloatFormat, cast, cast_with_values

FORMATS = [
    f for f in numerics.formats() if isinstance(f, FloatFormat) and f.dtype == f.native_dtype
]
ELEMENTS = [f for f in FORMATS if f.element]
NARROW = [f for f in ELEMENTS if f.is_low_precision]
INPUT_DTYPES = [np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)]
STOCHASTIC_COUNT = 2**15  # of elements, in all tests, so that they share a program
MODES = {"eager": cast, "jit": jax.jit(cast, static_argnums=1, static_argnames="rounding")}


def _stochastic(x, fmt, seed):
    return MODES["jit"](x, fmt, rounding="stochastic", key=jax.random.key(seed))


@pytest.mark.parametrize(
    ("mode", "dtype"), [*(("jit", d) for d in INPUT_DTYPES), ("eager", INPUT_DTYPES[2])], ids=str
)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_cast__every_16_bit_value_and_every_tie__equals_ml_dtypes(fmt, dtype, mode):
    x = oracles.cast_inputs(fmt.dtype, dtype)

    codes = MODES[mode](jnp.asarray(x), fmt)

    oracle = oracles.saturating_cast if fmt.element else oracles.plain_cast
    oracles.assert_same_bits(codes, oracle(x, fmt.dtype))


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_cast_with_values__every_16_bit_value_and_every_tie__are_those_of_ml_dtypes(fmt):
    x = oracles.cast_inputs(fmt.dtype, np.float32)

    codes, values = jax.jit(cast_with_values, static_argnums=1)(jnp.asarray(x), fmt)

    oracles.assert_same_bits(codes, oracles.saturating_cast(x, fmt.dtype))
    np.testing.assert_array_equal(values, oracles.saturating_cast(x, fmt.dtype).astype(np.float32))


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_cast__a_million_mixed_magnitudes__equals_ml_dtypes(fmt):
    x = oracles.mixed_magnitudes(fmt.min_subnormal, fmt.max)

    codes = MODES["jit"](jnp.asarray(x), fmt)

    oracles.assert_same_bits(codes, oracles.saturating_cast(x, fmt.dtype))


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_cast__every_16_bit_value_and_every_tie__equals_gfloat(fmt):
    if fmt.name not in oracles.GFLOAT_FORMATS:
        pytest.skip(f"gfloat does not know {fmt}")
    x = oracles.cast_inputs(fmt.dtype, np.float32)

    codes = MODES["jit"](jnp.asarray(x), fmt)

    expected = oracles.gfloat_cast(x, fmt.name).astype(oracles.unsigned(fmt.dtype))
    oracles.assert_same_bits(codes, expected.view(fmt.dtype))


@pytest.mark.parametrize("name", sorted(oracles.TORCH_DTYPES.keys() - {"e8m0fnu"}))
def test_cast__every_16_bit_value_and_every_tie__equals_torch(name):
    torch = pytest.importorskip("torch", reason="the torch oracle needs the extra 'oracle'")
    fmt = numerics.get_format(name)
    x = oracles.cast_inputs(fmt.dtype, np.float32)

    codes = MODES["jit"](jnp.asarray(x), fmt)

    clipped = torch.from_numpy(oracles.clip(x, oracles.PUBLISHED_LIMITS[name].max))
    tensor = clipped.to(getattr(torch, oracles.TORCH_DTYPES[name]))
    bits = tensor.view(torch.uint8).numpy().view(fmt.dtype)
    oracles.assert_same_bits(codes, bits.reshape(x.shape))


def test_cast__e8m0__takes_the_nearest_power_of_two_and_nan_for_what_has_none():
    x = jnp.array([1.0, 1.4142, 1.5, 3.0, 2.0**-127, 0.0, -1.0, jnp.inf, jnp.nan], jnp.float32)

    values = numerics.decode(cast(x, numerics.E8M0FNU), numerics.E8M0FNU)

    expected = [1.0, 1.0, 2.0, 4.0, 2.0**-127, np.nan, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(values, np.float32(expected))


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_cast__beyond_the_range__saturates_with_its_sign_and_keeps_nan(fmt):
    x = jnp.array([jnp.inf, -jnp.inf, 3.4028235e38, -3.4028235e38, jnp.nan], jnp.float32)

    values = oracles.f64(MODES["jit"](x, fmt))

    np.testing.assert_array_equal(values, [fmt.max, -fmt.max, fmt.max, -fmt.max, np.nan])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "fmt", [f for f in NARROW if isinstance(f, FloatFormat) and f.nonfinite], ids=str
)
def test_cast__nan_of_any_sign_and_payload__has_the_code_of_ml_dtypes(fmt, rounding):
    bits = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FC000FF]
    x = np.array(bits, np.uint32).view(np.float32)

    codes = cast(jnp.asarray(x), fmt, rounding=rounding, key=jax.random.key(0))

    with np.errstate(invalid="ignore"):
        expected = x.astype(fmt.dtype)
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_cast__negative_underflow__is_minus_zero_only_where_the_format_has_it(fmt):
    x = jnp.array([-0.0, -fmt.underflow_bound, -1e-40], jnp.float32)

    values = oracles.f32(MODES["jit"](x, fmt))

    np.testing.assert_array_equal(values, 0.0)
    np.testing.assert_array_equal(np.signbit(values), fmt.has_negative_zero)


def test_cast__bf16_beyond_f16__saturates():
    """65504 is 65536 in bf16: a clip in the input's type let 65536 through, as Inf."""
    x = jnp.array([65536.0, 1e6, -1e6], jnp.bfloat16)

    np.testing.assert_array_equal(cast(x, numerics.F16), np.float16([65504, 65504, -65504]))


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_cast__increasing_input__never_decreases(fmt):
    x = oracles.cast_inputs(fmt.dtype, np.float32)
    x = np.sort(x[~np.isnan(x)])

    values = oracles.f64(MODES["jit"](jnp.asarray(x), fmt))

    assert np.all(np.diff(values) >= 0)


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_cast__negated_input__negates_the_result(fmt):
    x = jnp.asarray(oracles.cast_inputs(fmt.dtype, np.float32))

    values, negated = (oracles.f32(MODES["jit"](s * x, fmt)) for s in (1.0, -1.0))

    np.testing.assert_array_equal(negated, -values)


@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(shape=st.lists(st.integers(0, 7), max_size=4))
def test_cast__any_shape__keeps_shape_and_sets_dtype(shape):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    codes = MODES["jit"](jnp.asarray(x), numerics.E5M2)

    oracles.assert_same_bits(codes, oracles.saturating_cast(x, ml_dtypes.float8_e5m2))


@pytest.mark.parametrize("x", [1.03, 1.3 * 2**-7, 1.4 * 2**-9, 0.3 * 2**-9, 447.9, -5.3])
@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_cast__stochastic__is_one_of_two_neighbours_with_the_mean_of_x(fmt, x):
    count = STOCHASTIC_COUNT
    x = float(np.float32(x))
    low, high = oracles.neighbours(x, fmt.dtype)

    values = np.asarray(_stochastic(jnp.full(count, x, jnp.float32), fmt, seed=0))

    values = values.astype(np.float64)
    assert set(np.unique(values)) <= {low, high}
    # Binomial: up with probability p has the standard error (high - low) sqrt(p (1 - p) / count);
    # four of them. At 1.03 in e4m3fn this bounds |mean / x - 1| by 0.0011.
    clipped = min(max(x, -fmt.max), fmt.max)
    p = (clipped - low) / max(high - low, 1e-30)
    assert abs(values.mean() - clipped) <= 4 * (high - low) * np.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_cast__stochastic_of_format_values__changes_nothing(fmt):
    codes = oracles.all_codes(fmt.dtype)
    codes = np.resize(codes[np.isfinite(oracles.f32(codes))], STOCHASTIC_COUNT)

    rounded = _stochastic(jnp.asarray(oracles.f32(codes)), fmt, seed=1)

    oracles.assert_same_bits(rounded, codes)


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_cast__stochastic_beyond_the_range__saturates_and_keeps_nan(fmt):
    just_above = np.nextafter(np.float32(fmt.max), np.float32(np.inf))
    x = np.float32([just_above, 1e38, np.inf, -just_above, -np.inf, np.nan])
    expected = np.float32([fmt.max] * 3 + [-fmt.max] * 2 + [np.nan])
    x, expected = (np.resize(a, STOCHASTIC_COUNT) for a in (x, expected))

    values = np.asarray(_stochastic(jnp.asarray(x), fmt, seed=2)).astype(np.float32)

    np.testing.assert_array_equal(values, expected)


def test_cast__stochastic_key__decides_the_result():
    x = jax.random.normal(jax.random.key(3), (64, 32))

    first, again, other = (np.asarray(_stochastic(x, numerics.E4M3FN, s)) for s in (4, 4, 5))

    np.testing.assert_array_equal(first.view(np.uint8), again.view(np.uint8))
    assert np.mean(first.view(np.uint8) != other.view(np.uint8)) > 0.2


def test_cast__stochastic__draws_independently_per_element():
    x = jnp.full((256, 256), 1.0625, jnp.float32)  # half way from 1 to 1.125

    up = oracles.f64(_stochastic(x, numerics.E4M3FN, seed=6)) > 1

    # Means of 256 fair draws have deviation 1/32; rows or columns all alike would have 0 or 1/2.
    for axis in (0, 1):
        assert 0.025 < up.mean(axis).std() < 0.038


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float8_e4m3fn])
def test_cast__not_a_wide_float__raises_and_names_the_type(dtype):
    with pytest.raises(TypeError, match=rf"x is {jnp.dtype(dtype).name}"):
        cast(jnp.ones(3, dtype), numerics.E5M2)


def test_cast__stochastic_without_key__raises_and_says_how():
    with pytest.raises(ValueError, match=r"needs a PRNG key; pass key="):
        cast(jnp.ones(3), numerics.E4M3FN, rounding="stochastic")


@pytest.mark.parametrize("fmt", [numerics.BF16, numerics.E8M0FNU], ids=str)
def test_cast__stochastic_to_a_compute_or_scale_type__raises(fmt):
    with pytest.raises(ValueError, match=f"formats to quantize to, not {fmt}"):
        cast(jnp.ones(3), fmt, rounding="stochastic", key=jax.random.key(0))


def test_cast__unknown_rounding__raises_and_names_the_known():
    with pytest.raises(ValueError, match="rounding is 'up'; use one of nearest, stochastic"):
        cast(jnp.ones(3), numerics.E4M3FN, rounding="up")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts what XLA:CPU makes of it")
@pytest.mark.parametrize(
    ("name", "opcode"),
    [("e4m3fn", "abs"), ("e5m2", "abs"), ("e4m3fnuz", "abs"), ("int8", "round-nearest-even")],
)
def test_cast__codes_that_are_kept_and_multiplied__are_computed_once(name, opcode):
    fmt = numerics.get_format(name)

    def keep_and_multiply(x, w):
        codes = cast(3 * x, fmt)
        kept = codes.view(jnp.uint8) if isinstance(fmt, FloatFormat) else codes
        return kept, jnp.dot(numerics.decode(codes, fmt, jnp.bfloat16), w)

    x, w = (jax.ShapeDtypeStruct((256, 256), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    program = jax.jit(keep_and_multiply).lower(x, w).compile().as_text()
    assert program.count(f" {opcode}(") == 1
