"""Scales of blocks from their amaxes: E8M0 (OCP MX) and two-level e4m3 (NVFP4). Pure functions.

Everything that decides a code is integer arithmetic on f32 bits. XLA:CPU flushes subnormals to
zero, its log2 and exp2 miss powers of two, and compiled code replaces ``x / c`` by ``x * (1 / c)``
and ``a / b / c`` by ``a / (b * c)``: each of them changes scales. See `divide`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics.casting import cast, decode
from lowprec_jax.numerics.formats import E4M3FN, Format, get_format

E8M0Rule = Literal["floor", "ceil", "rceil", "even"]
E8M0_RULES: tuple[E8M0Rule, ...] = ("floor", "ceil", "rceil", "even")
E8M0_NAN = 255

_MANTISSA = 23
_HIDDEN = 1 << _MANTISSA
_FRACTION = _HIDDEN - 1
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_BIAS = 127

# The smallest scale of a tensor under NVFP4. A tile scale of 2**-9, times it, times half of the
# smallest e2m1 number is 2**-126: what XLA:CPU flushes would have become zero anyway.
_MIN_GLOBAL_SCALE = 2.0**-115


def e8m0_code(amax: jax.Array, fmt: Format, rule: E8M0Rule) -> jax.Array:
    """The power-of-two scale of a block, as the code ``c`` of ``2**(c - 127)``.

    =======  ==============================================================  ==================
    rule     scale                                                           largest element
    =======  ==============================================================  ==================
    floor    2**floor(log2 amax), over 2**emax (OCP MX 1.0, section 6.3)     may saturate
    ceil     2**ceil(log2 amax), over 2**emax                                fits
    rceil    amax / fmt.max, rounded up to a power of two (NVIDIA, cuBLAS)   fits
    even     as floor, of amax rounded to the mantissa of `fmt`              may saturate (less)
    =======  ==============================================================  ==================

    All four add a constant to the bits of amax, which carries into the exponent where the rule says
    so. Zero has code 0, NaN 255; Inf has 254 under "rceil", else ``255 - emax``, a finite scale.
    Under "ceil" a subnormal counts as 2**-126, the next normal number.

    Args:
      amax: f32, any shape, >= 0; subnormals count.
      fmt: element format; emax is ``fmt.max_exponent``.
      rule: one of `E8M0_RULES`.

    Returns:
      uint8 codes of the shape of `amax`, at most 254 but for NaN.

    Raises:
      ValueError: no such rule.

    Source: `to_mx` of torchao; Transformer Engine for "rceil" (arXiv:2506.08027).
    Differs from: torchao, whose "rceil" takes ceil(log2) in f32 and so misses some amaxes just
      above a power of two times ``fmt.max``; microxcaling, which takes floor(log2) in f32.
    """
    top = int(np.float32(fmt.max).view(np.int32)) & _FRACTION
    carries = {
        "floor": 0,
        "ceil": _FRACTION,
        "rceil": _FRACTION - top,
        "even": _HIDDEN >> (fmt.mantissa_bits + 1),
    }
    if rule not in carries:
        raise ValueError(f"e8m0_code: rule is {rule!r}; use one of {', '.join(E8M0_RULES)}.")
    bits = lax.bitcast_convert_type(amax, jnp.int32) & _MAGNITUDE
    code = jnp.clip(((bits + carries[rule]) >> _MANTISSA) - fmt.max_exponent, 0, E8M0_NAN - 1)
    if rule == "rceil":
        code = jnp.where(bits <= _largest_with_code_zero(fmt), 0, code)
        code = jnp.where(bits == _INFINITY, E8M0_NAN - 1, code)
    return jnp.where(bits > _INFINITY, E8M0_NAN, code).astype(jnp.uint8)


def _largest_with_code_zero(fmt: Format) -> int:
    """Bits of the largest f32 whose quotient by ``fmt.max``, in f32, is at most 2**-127.

    The quotient is subnormal there, with a step of 2**-149; half a step rounds down.
    """
    bound = fmt.max * 2.0**-127 * (1 + 2.0**-23)  # exact in f64
    nearest = np.float32(bound)
    return int(nearest.view(np.int32)) - (float(nearest) > bound)


def e8m0_value(code: jax.Array) -> jax.Array:
    """``2**(code - 127)`` to compute with, f32; 255 is NaN.

    Code 0 gives 2**-126, not 2**-127: XLA:CPU would flush it to zero. `scale_down` and `scale_up`
    are exact for code 0.
    """
    bits = jnp.maximum(code.astype(jnp.int32), 1) << _MANTISSA
    return jnp.where(code == E8M0_NAN, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))


def scale_down(x: jax.Array, code: jax.Array) -> jax.Array:
    """``x / 2**(code - 127)``, f32, without flushing: `x` and the result may be subnormal.

    Exact, unless the result is subnormal and has to be rounded (ties to even) or overflows to Inf.

    Args:
      x: float array.
      code: E8M0 codes, uint8, broadcastable to `x`; 255 gives NaN.
    """
    scaled = _times_power_of_two(x, _BIAS - code.astype(jnp.int32))
    return jnp.where(code == E8M0_NAN, jnp.nan, scaled)


def scale_up(x: jax.Array, code: jax.Array) -> jax.Array:
    """``x * 2**(code - 127)``, f32: the inverse of `scale_down`, under the same terms."""
    scaled = _times_power_of_two(x, code.astype(jnp.int32) - _BIAS)
    return jnp.where(code == E8M0_NAN, jnp.nan, scaled)


def _times_power_of_two(x: jax.Array, power: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    magnitude = bits & _MAGNITUDE
    # A subnormal is a whole number of 2**-149; as that number it is normal.
    subnormal = magnitude < _HIDDEN
    whole = lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)
    normal = jnp.where(subnormal, whole, magnitude)
    exponent = (normal >> _MANTISSA) + power - jnp.where(subnormal, 149, 0)
    mantissa = (normal & _FRACTION) | _HIDDEN
    shift = jnp.clip(1 - exponent, 1, _MANTISSA + 2)
    odd = (mantissa >> shift) & 1
    rounded = (mantissa + (1 << (shift - 1)) - 1 + odd) >> shift  # a subnormal, ties to even
    result = jnp.where(exponent > 0, (exponent << _MANTISSA) | (mantissa & _FRACTION), rounded)
    result = jnp.where(exponent >= 255, _INFINITY, result)
    unchanged = (magnitude == 0) | (magnitude >= _INFINITY)
    result = jnp.where(unchanged, magnitude, result)
    return lax.bitcast_convert_type((bits & ~_MAGNITUDE) | result, jnp.float32)


def nvfp4_scales(
    tile_amax: jax.Array,
    tensor_amax: jax.Array,
    fmt: Format | str = "e2m1",
    *,
    element_max: float | None = None,
    scale_max: float = 448.0,
    scale_min: float = 2.0**-9,
) -> tuple[jax.Array, jax.Array]:
    """The two levels of NVFP4: an e4m3 scale for each tile under one f32 scale.

    ``global = tensor_amax / (scale_max * fmt.max)`` and
    ``scale = e4m3(tile_amax / element_max / global)``, with correctly rounded divisions, clipped to
    [scale_min, 448]. An element is ``x / (scale * global)``. A global scale below 2**-115 is raised
    to it. A tile whose amax is not finite has scale NaN; if `tensor_amax` is not, they all have.

    Args:
      tile_amax: f32, any shape.
      tensor_amax: f32 []: largest of all `tile_amax`, or an estimate (larger tiles saturate).
      fmt: element format.
      element_max: what a tile's amax is mapped onto; None: ``fmt.max``. 4 is the other choice of
        4-over-6 (arXiv:2512.02010).
      scale_max: scale of the tile that holds the tensor's amax; 256 for 4-over-6, so that a scale
        half as large again still fits.
      scale_min: smallest scale, 2**-9 (the smallest e4m3 number, so that no scale is zero) or more.

    Returns:
      Values of e4m3 codes, f32 of the shape of `tile_amax`, and the global scale, f32 [].

    Source: arXiv:2509.25149; `nvfp4_quantize` of torchao, to which it is equal bit for bit with
      ``scale_min=2**-6``; ModelOpt has 2**-9.
    Differs from: torchao, which keeps scales normal and so resolves tiles much smaller than the
      tensor worse; Transformer Engine, which multiplies with the reciprocal of the global scale
      and lets scales round to zero.
    """
    fmt = get_format(fmt)
    whole = divide(tensor_amax, jnp.float32(scale_max * fmt.max))
    whole = jnp.where(whole < _MIN_GLOBAL_SCALE, _MIN_GLOBAL_SCALE, whole)
    mapped = divide(tile_amax, jnp.float32(fmt.max if element_max is None else element_max))
    scale = divide(mapped, whole)
    scale = jnp.where(scale < scale_min, scale_min, scale)  # keeps NaN
    return decode(cast(scale, E4M3FN), E4M3FN), whole


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b`` rounded to nearest as IEEE 754 asks, also in compiled code.

    The barrier hides from XLA what it would rewrite: division by a constant or a scalar, and a
    division of a quotient.

    Args:
      a: f32 >= 0; subnormals count as zero.
      b: f32 > 0, normal, broadcastable to `a`.

    Returns:
      f32: zero where the quotient is subnormal, Inf beyond the range, NaN where `a` or `b` is not
      finite.
    """
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a, b = lax.optimization_barrier((jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)))
    finite = (a < jnp.inf) & (b < jnp.inf)
    return jnp.where(finite, lax.optimization_barrier(a / b), jnp.nan)
