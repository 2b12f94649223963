"""How much a quantization loses: SQNR and the fractions that saturate or underflow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics.formats import Format
from lowprec_jax.numerics.scaling import reciprocal

_INFINITY = 0x7F800000  # as bits of f32


def sqnr_db(reference: jax.Array, approximation: jax.Array) -> jax.Array:
    """Signal to quantization noise, ``20 log10(|ref| / |ref - approx|)`` in dB, f32 [].

    Inf where the two are equal. One bit of mantissa is worth 6 dB.
    """
    reference, approximation = reference.astype(jnp.float32), approximation.astype(jnp.float32)
    noise = jnp.linalg.norm((reference - approximation).ravel())
    return 20 * jnp.log10(jnp.linalg.norm(reference.ravel()) / noise)


class RangeStatistics(NamedTuple):
    """What one pass over a tensor tells about its range under a scale and a format; all f32 [].

    Attributes:
      amax: largest magnitude (NaN or Inf if an element is).
      saturated: number of elements whose rounding overflows, so that the cast clips them.
      underflow: number of non-zero elements that round to zero.
      nonfinite: number of NaN and infinite elements.
    """

    amax: jax.Array
    saturated: jax.Array
    underflow: jax.Array
    nonfinite: jax.Array


def range_statistics(x: jax.Array, scale: jax.Array, fmt: Format) -> RangeStatistics:
    """amax and the three counts in one pass, see `range_counts`.

    Args:
      x: float array, any shape.
      scale: the scale it is quantized with, f32, broadcastable to `x`.
      fmt: the format it is quantized to.
    """
    counts = range_counts(x, reciprocal(scale), fmt)
    numbers = range_numbers(counts)
    return RangeStatistics(*(numbers[0, column] for column in range(4)))


def range_counts(x: jax.Array, factor: jax.Array, fmt: Format) -> jax.Array:
    """`RangeStatistics` as int32[1, 4]: the bits of the amax in f32, and the three counts.

    One variadic reduction: on XLA:CPU three separate ones take about 30 times as long.

    Args:
      x: float array, any shape.
      factor: what it is multiplied with before the cast, f32, broadcastable to `x`.
      fmt: the format it is quantized to.
    """
    magnitude = lax.convert_element_type(lax.abs(lax.expand_dims(x, (0, 1))), jnp.float32)
    bits = lax.bitcast_convert_type(magnitude, jnp.int32)  # see `magnitude_bits`
    factor = factor if factor.ndim == 0 else jnp.broadcast_to(factor, magnitude.shape)
    scaled = lax.mul(magnitude, factor)
    small = lax.le(scaled, np.float32(fmt.underflow_bound))
    counts = (
        lax.gt(scaled, np.float32(fmt.overflow_bound)),
        lax.bitwise_and(small, lax.gt(magnitude, np.float32(0))),
        lax.ge(bits, np.int32(_INFINITY)),
    )

    def combine(a, b):
        return (lax.max(a[0], b[0]), *(lax.add(p, q) for p, q in zip(a[1:], b[1:], strict=True)))

    totals = lax.reduce(
        (bits, *(lax.convert_element_type(c, jnp.int32) for c in counts)),
        (np.int32(0),) * (1 + len(counts)),
        combine,
        tuple(range(2, bits.ndim)),
    )
    return lax.concatenate(totals, 1)


def range_numbers(counts: jax.Array) -> jax.Array:
    """f32[n, 4] of int32[n, 4] from `range_counts`."""
    bits, others = lax.split(counts, (1, counts.shape[1] - 1), axis=1)
    amax = lax.bitcast_convert_type(bits, jnp.float32)
    return lax.concatenate((amax, lax.convert_element_type(others, jnp.float32)), 1)


def saturated_fraction(x: jax.Array, scale: jax.Array, fmt: Format) -> jax.Array:
    """Fraction of the elements that the cast clips, f32 []; Inf counts, NaN does not."""
    return range_statistics(x, scale, fmt).saturated / max(x.size, 1)


def underflow_fraction(x: jax.Array, scale: jax.Array, fmt: Format) -> jax.Array:
    """Fraction of the elements that are not zero and quantize to zero, f32 []."""
    return range_statistics(x, scale, fmt).underflow / max(x.size, 1)
