"""Backends for studies: FP8 products accumulated with few bits, as Hopper's tensor cores do.

Codes are multiplied exactly. The 32 products of one instruction and the accumulator are aligned to
the largest exponent among them, each is truncated to 13 fraction bits below it, and so is the sum.
Adding many products of one sign then loses more than quantizing them did.

``truncated``: one such accumulator over the whole contraction (fast accumulation of cuBLAS).
``promoted``: one for each 128 elements, whose sums are added in f32 (its split accumulation).

All three GEMMs of a layer are computed in this way; on the hardware `lax.Precision` decides for
each. No speed is claimed. Formats that hardware does not multiply as floats are left to the
platform: integers accumulate exactly.

Source: DeepSeek-V3, arXiv:2412.19437, section 3.5.2; Khattak and Mikaitis, *Accurate models of
  NVIDIA tensor cores*, arXiv:2512.07004, for the order of alignment and truncation.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.errors import UserError
from lowprec_jax.numerics import Format, decode
from lowprec_jax.ops.backends import Formats, dot, register_backend
from lowprec_jax.ops.dimensions import DotDimensions

FRACTION_BITS = 13
PRODUCTS_PER_STEP = 32
PROMOTION_INTERVAL = 128

_F32_FRACTION_BITS = 23
# The exponent of zero: below those of all products and sums, and 2**(13 + 100) is an f32 number.
_NO_EXPONENT = -100


def truncated(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensions,
    *,
    formats: Formats,
    precision=None,
    out_sharding=None,
) -> jax.Array:
    """Multiplies codes with one accumulator of 13 fraction bits over the whole contraction.

    Args:
      lhs: codes.
      rhs: codes.
      dimension_numbers: as in `jax.lax.dot_general`.
      formats: formats of the codes.
      precision: of formats that are left to the platform.
      out_sharding: must be None.

    Returns:
      The product, f32.

    Raises:
      UserError: `out_sharding` is given.
    """
    return _multiply(lhs, rhs, dimension_numbers, formats, precision, out_sharding, None)


def promoted(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensions,
    *,
    formats: Formats,
    precision=None,
    out_sharding=None,
) -> jax.Array:
    """As `truncated` within 128 elements of the contraction; their sums are added in f32."""
    interval = PROMOTION_INTERVAL
    return _multiply(lhs, rhs, dimension_numbers, formats, precision, out_sharding, interval)


register_backend("truncated", truncated)
register_backend("promoted", promoted)


def _multiply(lhs, rhs, dimensions, formats: Formats, precision, out_sharding, interval):
    if out_sharding is not None:
        raise UserError(
            f"Emulated accumulation: out_sharding is {out_sharding}; meshes with explicit axes are "
            "not supported. Use backend=None there."
        )
    if not _are_native_floats(formats):
        return dot(lhs, rhs, dimensions, formats=formats, precision=precision)
    (contracted_left, contracted_right), (batch_left, batch_right) = dimensions
    left, batch, free_left = _rows(lhs, contracted_left, batch_left)
    right, _, free_right = _rows(rhs, contracted_right, batch_right)
    whole = PRODUCTS_PER_STEP * max(1, math.ceil(left.shape[-1] / PRODUCTS_PER_STEP))
    out = _accumulate(left, right, formats, interval or whole)
    return out.reshape((*batch, *free_left, *free_right))


def _are_native_floats(formats: Formats) -> bool:
    dtypes = [fmt.native_dtype for fmt in formats]
    return all(dtype is not None and jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)


def _rows(codes: jax.Array, contracted, batch):
    """Codes [G, M, K], with the batch and the free part of the shape."""
    free = tuple(i for i in range(codes.ndim) if i not in (*contracted, *batch))
    batch_shape, free_shape, sums = (
        tuple(codes.shape[axis] for axis in axes) for axes in (batch, free, contracted)
    )
    rows = codes.transpose((*batch, *free, *contracted))
    shape = (math.prod(batch_shape), math.prod(free_shape), math.prod(sums))
    return rows.reshape(shape), batch_shape, free_shape


def _accumulate(left, right, formats: Formats, interval: int) -> jax.Array:
    """f32 [G, M, N] from codes [G, M, K] and [G, N, K]: intervals in f32, within them 13 bits."""
    operands = [
        part
        for codes, fmt in zip((left, right), formats, strict=True)
        for part in _significands(codes, fmt, interval)
    ]
    zeros = jnp.zeros((*left.shape[:2], right.shape[1]), jnp.float32)
    zeros = compat.to_varying(zeros, compat.varying_axes(left) | compat.varying_axes(right))

    def add_interval(total, steps):
        partial, _ = lax.scan(lambda sum_, step: (_step(sum_, *step), None), zeros, steps)
        return total + partial, None

    return lax.scan(add_interval, zeros, tuple(operands))[0]


def _significands(codes: jax.Array, fmt: Format, interval: int) -> tuple[jax.Array, jax.Array]:
    """Values and exponents, [intervals, steps, G, M, 32], padded with zeros.

    The exponent of a subnormal is that of the smallest normal, as in the code.
    """
    values = decode(codes, fmt)
    values = jnp.pad(values, ((0, 0), (0, 0), (0, -values.shape[-1] % interval)))
    steps = values.shape[-1] // interval, interval // PRODUCTS_PER_STEP
    values = values.reshape(*values.shape[:2], *steps, PRODUCTS_PER_STEP)
    values = values.transpose(2, 3, 0, 1, 4)
    lowest = math.frexp(fmt.min_normal)[1] - 1
    exponents = jnp.where(values == 0, _NO_EXPONENT, jnp.maximum(_exponent(values), lowest))
    return values, exponents


def _step(total, left, left_exponent, right, right_exponent) -> jax.Array:
    """The accumulator f32 [G, M, N] after one instruction on [G, M, 32] and [G, N, 32]."""
    products = left[:, :, None] * right[:, None]
    exponents = left_exponent[:, :, None] + right_exponent[:, None]
    largest = jnp.maximum(exponents.max(-1), jnp.where(total == 0, _NO_EXPONENT, _exponent(total)))
    largest = jnp.clip(largest, _NO_EXPONENT, -_NO_EXPONENT)
    to_units = _power_of_two(FRACTION_BITS - largest)
    units = jnp.trunc(products * to_units[..., None]).sum(-1) + jnp.trunc(total * to_units)
    return _truncate(units * _power_of_two(largest - FRACTION_BITS))


def _truncate(x: jax.Array) -> jax.Array:
    """Towards zero, to 13 fraction bits of its own exponent; a zero is positive."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    dropped = _F32_FRACTION_BITS - FRACTION_BITS
    kept = lax.bitcast_convert_type(bits >> dropped << dropped, jnp.float32)
    return jnp.where(jnp.isnan(x), x, jnp.where(kept == 0, 0, kept))


def _exponent(x: jax.Array) -> jax.Array:
    """``floor(log2(|x|))`` of normal f32 numbers, int32; 128 for Inf and NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return ((bits >> _F32_FRACTION_BITS) & 255) - 127


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """``2**exponent``, f32, for exponents of normal numbers."""
    return lax.bitcast_convert_type((exponent + 127) << _F32_FRACTION_BITS, jnp.float32)
