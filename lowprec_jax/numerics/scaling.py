"""amax and scale: what a tensor's range is, and what maps it onto a format. Pure functions.

One convention everywhere: ``x ≈ data * scale``. The scale multiplies on the way back; quantizing
multiplies with its reciprocal. Transformer Engine and torchao store the reciprocal.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics.formats import Format

# Within these bounds a scale and its reciprocal are finite, normal f32 numbers.
MIN_SCALE = 2.0**-126
MAX_SCALE = 2.0**126
# XLA flushes subnormal f32 to zero on CPU: an amax below this counts as zero everywhere.
MIN_AMAX = 2.0**-126
_MINUS_ONE = np.float32(-1).view(np.int32)


def compute_amax(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """Largest magnitude, f32: NaN if any element is NaN, Inf if any is infinite, 0 if empty.

    Args:
      x: float array.
      axes: axes to reduce over, which stay with size 1; None reduces all of them, to rank 0.

    Not `jnp.max`: see `magnitude_bits`. Reducing NaN flags along with the magnitudes keeps XLA:CPU
    on its quick path where the last axis is reduced, 2 to 3 times as fast as the float maximum;
    along other axes that takes 30 times as long as the maximum of the bits.
    """
    over = tuple(range(x.ndim)) if axes is None else tuple(axes)
    bits = magnitude_bits(x)
    if x.ndim and x.ndim - 1 not in over:
        amax = lax.bitcast_convert_type(jnp.max(bits, over, initial=0), jnp.float32)
    else:
        largest, nan = lax.reduce(
            (bits, jnp.isnan(x).astype(jnp.int32)),
            (np.int32(0), np.int32(0)),
            lambda a, b: (lax.max(a[0], b[0]), lax.bitwise_or(a[1], b[1])),
            over,
        )
        amax = jnp.where(nan > 0, jnp.nan, lax.bitcast_convert_type(largest, jnp.float32))
    return amax if axes is None else jnp.expand_dims(amax, over)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """``|x|`` in f32, seen as int32: the same order, then Inf, then NaN.

    The float maximum of XLA:CPU loses NaN when it vectorizes a reduction (openxla/xla#21461): with
    one NaN among 4096 ones, `jnp.max` returned 1, or -Inf with the NaN in the last place.
    """
    magnitude = lax.convert_element_type(lax.abs(x), jnp.float32)
    return lax.bitcast_convert_type(magnitude, jnp.int32)


def usable(amax: jax.Array) -> jax.Array:
    """Whether an amax says something about the range: a normal, finite f32 number."""
    return lax.bitwise_and(lax.ge(amax, np.float32(MIN_AMAX)), lax.lt(amax, np.float32(np.inf)))


def scale_from_amax(
    amax: jax.Array, fmt: Format, *, margin: int = 0, fallback: jax.Array | float = 1.0
) -> jax.Array:
    """Turns an amax into the scale that maps it onto the format's largest value.

    ``scale = amax * (1 / fmt.scale_max) * 2**margin``, with the reciprocal rounded to f32 once, so
    that compiled code, eager code and NumPy agree bit for bit. Where `amax` is zero, subnormal or
    not finite the result is `fallback`. The scale and its reciprocal are finite and positive.

    Args:
      amax: largest magnitude, f32, any shape.
      fmt: target format; only ``fmt.scale_max`` is read.
      margin: powers of two of head-room; 1 halves the largest code used.
      fallback: scale where `amax` is unusable, f32, > 0, broadcastable to `amax`.

    Returns:
      Scale, f32, of the shape of `amax`: ``x ≈ data * scale``.

    Source: DelayedScaling, NVIDIA/TransformerEngine, common/recipe/__init__.py.
    Differs from: that source and torchao, which store the reciprocal; TE-JAX, whose scale
      overflows for a tiny amax.
    """
    return jnp.where(usable(amax), _scaled(amax, scale_factor(fmt, margin)), fallback)


def scale_factor(fmt: Format, margin: int = 0) -> np.float32:
    """What an amax is multiplied with to give a scale, see `scale_from_amax`."""
    # Beyond 2**126 (bf16, f32) the reciprocal would be subnormal, which XLA:CPU flushes to zero.
    factor = np.maximum(np.float32(1) / np.float32(fmt.scale_max), np.float32(MIN_SCALE))
    return factor * np.float32(2.0**margin)


def scale_from_history(amax: jax.Array, factor: np.ndarray, powers_of_two: np.ndarray) -> jax.Array:
    """The scale of the largest usable amax along the last axis; 1 where none is usable.

    The largest of the scales, not the scale of the largest: XLA:CPU computes again, in each kernel
    that reads a result, all that comes after a maximum.

    Args:
      amax: amaxes, f32[..., window].
      factor: the `scale_factor` of each result, f32, broadcastable to ``amax[..., 0]``.
      powers_of_two: whether a scale is rounded up to a power of two, bool, of the same shape.
    """
    # Repeated by NumPy: a `lax.scan` hoists a broadcast of constants, into a kernel of its own.
    factor = np.repeat(factor[..., None], amax.shape[-1], axis=-1)
    shape = np.broadcast_shapes(amax.shape, factor.shape)
    amax = jnp.broadcast_to(amax, shape)
    scale = _scaled(amax, jnp.broadcast_to(factor, shape))
    if powers_of_two.any():
        scale = jnp.where(powers_of_two[..., None], round_up_to_power_of_two(scale), scale)
    # The order of positive floats is that of their bits, of which XLA:CPU finds the largest in the
    # same kernel as the scales. -1 is less than every scale, and its magnitude is what stands for
    # none. It is made from the scales so that it is not hoisted either.
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    none = lax.bitwise_or(lax.bitwise_and(bits, np.int32(0)), _MINUS_ONE)
    known = lax.select(usable(amax), bits, none)
    largest = lax.reduce(known, _MINUS_ONE, lax.max, (known.ndim - 1,))
    return lax.abs(lax.bitcast_convert_type(largest, jnp.float32))


def _scaled(amax: jax.Array, factor: jax.Array | np.float32) -> jax.Array:
    return lax.clamp(np.float32(MIN_SCALE), lax.mul(amax, factor), np.float32(MAX_SCALE))


def round_up_to_power_of_two(scale: jax.Array) -> jax.Array:
    """The smallest power of two that is not below `scale`, f32, from the exponent bits.

    Args:
      scale: f32, from `MIN_SCALE` to `MAX_SCALE`. Up, so that what fitted the format still fits.
    """
    exponent_bits = ~np.int32(2**23 - 1)
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    # Adding the mantissa mask carries into the exponent unless the mantissa is zero.
    return lax.bitcast_convert_type((bits + ~exponent_bits) & exponent_bits, jnp.float32)


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale, f32: the factor that quantizing multiplies with."""
    return lax.div(np.float32(1), scale)
