"""Rounding to a float format and back, by integer arithmetic on the bits of f32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics.float_format import FloatFormat
from lowprec_jax.numerics.uniform import uniform

_F32_MANTISSA = 23
_F32_BIAS = 127
_EXPONENT = 0x7F800000
_QUIET_NAN = 0x7FC00000


def round_to_float(
    x: jax.Array, fmt: FloatFormat, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes of f32 values and what they stand for, f32: saturating, to nearest even, or at random.

    A magnitude is a whole number of steps ("ulps") of its binade, where the binades below the
    smallest normal number share its step. Adding 2**23 steps makes the f32 addition round to whole
    steps (nearest, ties to even), and the low bits of the sum are their number; the code is that
    number plus the first code of the binade, which is added along with the 2**23. A carry into the
    next binade is the next code, as wanted. Subtracted again, the rounded magnitude is left.

    NaN becomes ``fmt.nan_code``, with its sign where that has one; where there is none, the code of
    -0: as in `ml_dtypes`.

    Args:
      x: f32 array.
      fmt: the format.
      key: PRNG key, which rounds stochastically; None: to nearest.
    """
    magnitude = lax.abs(x)
    clipped = lax.min(magnitude, np.float32(fmt.max))
    min_exponent = _F32_BIAS + 1 - fmt.bias  # biased f32 exponent of fmt.min_normal
    exponent = lax.bitwise_and(_as_bits(clipped), np.uint32(_EXPONENT))
    binade = lax.max(exponent, np.uint32(min_exponent << _F32_MANTISSA))
    rounded, code = (
        _nearest(clipped, binade, fmt) if key is None else _stochastic(clipped, binade, fmt, key)
    )
    value = lax.mul(rounded, lax.sign(x))  # which keeps -0 and NaN
    stored = np.dtype(f"uint{8 * fmt.dtype.itemsize}")
    code = lax.convert_element_type(code, stored)
    negative = lax.lt(lax.bitcast_convert_type(x, jnp.int32), np.int32(0))
    if not fmt.has_negative_zero:
        code = code & stored.type(fmt.sign_bit - 1)
        negative = negative & (code != stored.type(0))
    # The sign joins last: XLA:CPU computes again, for every use, what is made of one large array;
    # what is made of two, as here, is kept.
    code = lax.select(negative, code | stored.type(fmt.sign_bit), code)
    if not fmt.nonfinite:  # NaN is the code of -0, or there is none
        is_nan = lax.ne(magnitude, magnitude)
        code = lax.select(is_nan, _filled(code, fmt.sign_bit), code)
        if fmt.nan_code is None:
            value = lax.select(is_nan, _as_float(_filled(_as_bits(value), 0)), value)
    return lax.bitcast_convert_type(code, fmt.dtype), value


def _first_code(binade: jax.Array, fmt: FloatFormat, added: int = 0) -> jax.Array:
    """The code of a binade less its steps, u32, plus a number."""
    exponent = lax.shift_right_logical(binade, np.uint32(_F32_MANTISSA - fmt.mantissa_bits))
    smallest = (_F32_BIAS + 1 - fmt.bias) << fmt.mantissa_bits
    return lax.add(exponent, np.uint32((added - smallest) % 2**32))


def _nearest(
    magnitude: jax.Array, binade: jax.Array, fmt: FloatFormat
) -> tuple[jax.Array, jax.Array]:
    """The rounded magnitude, and its code in the low bits of u32; NaN has one where that exists."""
    steps = (_F32_MANTISSA - fmt.mantissa_bits) << _F32_MANTISSA  # 2**23 of them, times the binade
    if fmt.mantissa_bits:
        magic = _as_float(lax.add(binade, _first_code(binade, fmt, steps)))
        total = lax.add(magnitude, magic)
        code = _as_bits(total)
        if fmt.nan_code is not None and fmt.nonfinite:
            # NaN lies above all sums, as its code lies above all codes.
            exponent = _F32_BIAS + fmt.max_exponent + _F32_MANTISSA - fmt.mantissa_bits
            code = lax.min(code, np.uint32((exponent << _F32_MANTISSA) + fmt.nan_code))
        return lax.sub(total, magic), code
    # First codes are odd in every second binade: added before, they would turn ties around.
    magic = binade + np.uint32(steps)
    total = magnitude + _as_float(magic)
    return total - _as_float(magic), _as_bits(total) - magic + _first_code(binade, fmt)


def _stochastic(
    magnitude: jax.Array, binade: jax.Array, fmt: FloatFormat, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `_nearest`; up with the probability of the fraction of a step."""
    to_steps = np.uint32((2 * _F32_BIAS + fmt.mantissa_bits) << _F32_MANTISSA) - binade
    step = binade - np.uint32(fmt.mantissa_bits << _F32_MANTISSA)
    steps = magnitude * _as_float(to_steps)  # exact: a power of two
    whole = lax.floor(steps)
    # fmt.max is on the grid: a clipped magnitude has no fraction there and cannot exceed it.
    whole = whole + (uniform(key, magnitude.shape) < steps - whole).astype(jnp.float32)
    # By way of int32, for which CPUs have an instruction.
    code = whole.astype(jnp.int32).astype(jnp.uint32) + _first_code(binade, fmt)
    if fmt.nan_code is not None and fmt.nonfinite:
        code = lax.select(magnitude != magnitude, _filled(code, fmt.nan_code), code)
    return whole * _as_float(step), code


def float_from_code(codes: jax.Array, fmt: FloatFormat, dtype=jnp.float32) -> jax.Array:
    """Values of the low ``fmt.bits`` bits of unsigned codes, exact where `dtype` holds them.

    Normal numbers are shifted into place. Subnormals are counted in steps: to shift them too and
    multiply would pass through f32 subnormals, which XLA:CPU flushes to zero.
    """
    code = lax.convert_element_type(codes, jnp.int32)
    magnitude = code & np.int32(fmt.sign_bit - 1)
    to_place = np.int32(_F32_MANTISSA - fmt.mantissa_bits)
    normal = (magnitude << to_place) + np.int32((_F32_BIAS - fmt.bias) << _F32_MANTISSA)
    steps = lax.convert_element_type(magnitude, jnp.float32)
    subnormal = lax.bitcast_convert_type(steps * np.float32(fmt.min_subnormal), jnp.int32)
    bits = lax.select(magnitude < np.int32(1 << fmt.mantissa_bits), subnormal, normal)
    if fmt.nonfinite > 1:
        infinite = magnitude == np.int32(fmt.max_code + 1)
        bits = lax.select(infinite, _filled(bits, _EXPONENT), bits)
    if fmt.nan_code is not None:
        first = fmt.max_code + 1 + (fmt.nonfinite > 1)
        nan = magnitude >= np.int32(first) if fmt.nonfinite else code == np.int32(fmt.sign_bit)
        bits = lax.select(nan, _filled(bits, _QUIET_NAN), bits)
    bits = bits | ((code & np.int32(fmt.sign_bit)) << np.int32(32 - fmt.bits))
    value = lax.bitcast_convert_type(bits, jnp.float32)
    if dtype == jnp.bfloat16 and fmt.exact_in_bf16:
        return narrow_to_bf16(value)
    return lax.convert_element_type(value, dtype)


def narrow_to_bf16(x: jax.Array) -> jax.Array:
    """bf16 of f32 values that it holds exactly: their upper halves.

    XLA:CPU takes about four times as long to convert, since that rounds.
    """
    upper = lax.shift_right_logical(_as_bits(x), np.uint32(16))
    return lax.bitcast_convert_type(lax.convert_element_type(upper, jnp.uint16), jnp.bfloat16)


def _filled(like: jax.Array, value: int) -> jax.Array:
    """An array of one integer, made from another, so that no `lax.scan` hoists it.

    Differentiated scans compute what does not depend on their input once, in memory. XLA sees that
    this is a constant.
    """
    return (like & np.zeros((), like.dtype)) | np.array(value, like.dtype)


def _as_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _as_float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
