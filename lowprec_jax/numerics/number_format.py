"""What all number formats have in common: the attributes that quantizers and recipes read."""

import math

import numpy as np


class Format:
    """A set of numbers with codes: floats, integers or a table. Frozen, hashable, static under jit.

    Only `casting` looks at the kind of a format; everything else reads these attributes.

    Attributes:
      name: registry name.
      layout: what the bits of a code mean, in words.
      specials: what there is besides numbers, in words: "Inf NaN -0".
      bits: bits of one code.
      dtype: type of the arrays of codes. Codes with no type of their own in XLA are the low bits of
        uint8 or uint16.
      native_dtype: JAX type whose arrays hardware multiplies; None where no hardware does.
      element: whether tensors may be quantized to it; False for types that only hold scales.
      mantissa_bits: bits behind the leading one in the largest binade (floats: of every normal).
      max: largest finite magnitude.
      min_normal: smallest positive number with a full mantissa.
      min_subnormal: smallest positive number.
      epsilon: step of the largest binade over its power of two; ``2**-mantissa_bits`` for floats.
      underflow_bound: largest magnitude that rounds to zero.
      overflow_bound: largest magnitude that counts as in range; beyond it casts clip by more than
        they round.
      exact_in_bf16: whether bf16 holds every finite value.
      nan_code: code of the NaN that a cast produces, None where the format has none. A cast of NaN
        is zero there: block recipes keep the NaN in the scale.
    """

    name: str
    layout: str
    specials: str = ""
    bits: int
    dtype: np.dtype
    native_dtype: np.dtype | None = None
    element: bool = True
    mantissa_bits: int
    max: float
    min_normal: float
    min_subnormal: float
    epsilon: float
    underflow_bound: float
    overflow_bound: float
    exact_in_bf16: bool
    nan_code: int | None = None

    @property
    def scale_max(self) -> float:
        """What a scale maps an amax onto: the largest value; half a step more for integers."""
        return self.max

    @property
    def max_exponent(self) -> int:
        """``floor(log2(max))``, the ``emax`` of OCP MX 1.0."""
        return math.frexp(self.max)[1] - 1

    @property
    def is_low_precision(self) -> bool:
        """Whether this is a format to quantize to, not a compute type (bf16, f16, f32)."""
        return self.bits <= 8 or self.native_dtype is None

    def __str__(self) -> str:
        return self.name
