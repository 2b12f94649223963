"""The cast: rounds to a format's grid, saturating; and back. Pure functions on arrays.

A bare ``x.astype(float8_e4m3fn)`` turns 465 into NaN, and XLA:CPU's conversion is slow. `cast`
saturates, and rounds to floats with integer arithmetic on the f32 bits: the same result bit for bit
(tested on every bf16 and f16 value and every midpoint), at about a quarter of the time.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics.codebook_format import CodebookFormat
from lowprec_jax.numerics.float_casting import float_from_code, round_to_float
from lowprec_jax.numerics.float_format import FloatFormat
from lowprec_jax.numerics.integer_format import IntegerFormat
from lowprec_jax.numerics.number_format import Format
from lowprec_jax.numerics.uniform import uniform

Rounding = Literal["nearest", "stochastic"]


def cast(
    x: jax.Array, fmt: Format, *, rounding: Rounding = "nearest", key: jax.Array | None = None
) -> jax.Array:
    """Rounds to the nearest value of a format; magnitudes beyond ``fmt.max`` become ``±fmt.max``.

    ±Inf saturates to ``±fmt.max``. Ties go to the even code. NaN stays NaN where the format has it
    and is a zero elsewhere: in floats with the code of -0, as in `ml_dtypes`. Formats without
    negative zero turn -0, and negative values that underflow, into +0. For the scale type e8m0fnu
    the nearest power of two is taken and zero, negative numbers and Inf become NaN, as in
    `ml_dtypes`; the OCP rules for choosing block scales are functions of their own.

    Args:
      x: float array of any shape. Rounding starts from the f32 value.
      fmt: target format.
      rounding: "nearest", or "stochastic": up with the probability of the distance to the lower
        neighbour, so that the expectation is `x` (within the format's range).
      key: PRNG key, needed for stochastic rounding only.

    Returns:
      Array of ``fmt.dtype`` and the shape of `x`.

    Raises:
      TypeError: `x` is not a float array of 16 bits or more.
      ValueError: an unknown rounding, stochastic rounding without a key, or to a compute or scale
        type.

    Differs from: ``astype``, which does not saturate.
    """
    return cast_with_values(x, fmt, rounding=rounding, key=key)[0]


def cast_with_values(
    x: jax.Array, fmt: Format, *, rounding: Rounding = "nearest", key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """`cast`, and what the codes stand for, f32 of the same shape: ``decode`` of them, for less.

    None where nothing is saved by it, so that it must be decoded. See `cast` for the rest.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.dtype(x.dtype).itemsize < 2:
        raise TypeError(
            f"cast: x is {x.dtype}; pass float32, bfloat16 or float16 (dequantize codes first)."
        )
    _check_rounding(rounding, key, fmt)
    if not fmt.element:
        return x.astype(fmt.dtype), None
    if not fmt.is_low_precision:
        return _clip(x, fmt).astype(fmt.dtype), None
    x = lax.convert_element_type(x, jnp.float32)
    key = key if rounding == "stochastic" else None
    match fmt:
        case FloatFormat():
            return round_to_float(x, fmt, key)
        case IntegerFormat():
            return _round_to_integer(x, fmt, key)
        case CodebookFormat():
            return _round_to_codebook(x, fmt, key), None
    raise TypeError(f"cast: no rounding is known for formats like {fmt!r}.")


def decode(codes: jax.Array, fmt: Format, dtype=jnp.float32) -> jax.Array:
    """The values of codes, exactly where `dtype` holds them (see `Format.exact_in_bf16`).

    Args:
      codes: array of ``fmt.dtype``, or of ``fmt.native_dtype``.
      fmt: the format of the codes.
      dtype: float type of the result.

    Raises:
      TypeError: `codes` are of another type.
    """
    if fmt.native_dtype is not None and codes.dtype == fmt.native_dtype:
        if dtype == jnp.bfloat16:
            return codes.astype(dtype)
        if isinstance(fmt, FloatFormat) and fmt.has_sign and fmt.bits == 8:
            # By integers: XLA:CPU's own conversion to f32 takes twice as long; that to bf16, above,
            # does not, and is a single operation to compile.
            return float_from_code(lax.bitcast_convert_type(codes, jnp.uint8), fmt, dtype)
        return codes.astype(dtype)
    if codes.dtype != fmt.dtype:
        raise TypeError(f"decode: codes of {fmt} are {fmt.dtype.name}, given: {codes.dtype}.")
    match fmt:
        case FloatFormat():
            return float_from_code(codes, fmt, dtype)
        case IntegerFormat():
            return (codes.astype(jnp.float32) * np.float32(fmt.step)).astype(dtype)
        case CodebookFormat():
            values = jnp.array(fmt.values, dtype)
            return values.at[codes].get(mode="promise_in_bounds")
    raise TypeError(f"decode: no rule is known for formats like {fmt!r}.")


def _check_rounding(rounding: Rounding, key: jax.Array | None, fmt: Format) -> None:
    if rounding not in get_args(Rounding):
        raise ValueError(
            f"cast: rounding is {rounding!r}; use one of {', '.join(get_args(Rounding))}."
        )
    if rounding == "nearest":
        return
    if key is None:
        raise ValueError(
            "cast: stochastic rounding needs a PRNG key; pass key=jax.random.key(...)."
        )
    if not (fmt.element and fmt.is_low_precision):
        raise ValueError(
            f"cast: stochastic rounding is for formats to quantize to, not {fmt}; use 'nearest'."
        )


def _clip(x: jax.Array, fmt: Format) -> jax.Array:
    """Saturates by selection: `jnp.clip` would flush f32 subnormals to zero on XLA:CPU."""
    wide = x.astype(jnp.float32)  # in bf16 the limit 65504 of f16 would round to 65536
    limit = np.float32(fmt.max)
    return jnp.where(jnp.abs(wide) > limit, jnp.sign(wide) * limit, wide)


def _round_to_integer(
    x: jax.Array, fmt: IntegerFormat, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes of f32 values and their values; the scaling to steps is by a power of two, exact."""
    limit = float(fmt.max_code)
    steps = jnp.clip(x * np.float32(1 / fmt.step), -limit, limit)
    if key is None:
        whole = jnp.round(steps)
    else:
        lower = jnp.floor(steps)
        up = uniform(key, x.shape) < steps - lower
        whole = lower + up.astype(jnp.float32)
    # Zero for NaN joins the codes as they are stored, see `round_to_float`.
    is_nan = jnp.isnan(x)
    codes = jnp.where(is_nan, 0, whole.astype(fmt.dtype))
    return codes, jnp.where(is_nan, 0, whole) * np.float32(fmt.step)


def _round_to_codebook(x: jax.Array, fmt: CodebookFormat, key: jax.Array | None) -> jax.Array:
    """Codes of f32 values: how many thresholds lie below."""
    if key is None:
        code = _count_below(x, fmt.thresholds)
    else:
        values = jnp.array(fmt.values, jnp.float32)
        clipped = jnp.clip(x, values[0], values[-1])
        lower = _count_below(clipped, fmt.values[1:-1])  # the lower neighbour, or x itself above it
        low, high = values[lower], values[lower + 1]
        up = uniform(key, x.shape) < (clipped - low) / (high - low)
        code = lower + up.astype(jnp.int32)
    return jnp.where(jnp.isnan(x), fmt.zero_code, code).astype(fmt.dtype)


def _count_below(x: jax.Array, thresholds: tuple[float, ...]) -> jax.Array:
    """How many of the sorted thresholds are less than `x`, i32 of its shape."""
    if len(thresholds) > 32:
        return jnp.searchsorted(jnp.array(thresholds, jnp.float32), x).astype(jnp.int32)
    return sum((x > t).astype(jnp.int32) for t in thresholds) + jnp.zeros(x.shape, jnp.int32)
