"""Floating-point formats: widths, bias and special codes; every limit follows from these."""

import dataclasses
import functools
import math

import numpy as np

from lowprec_jax.numerics.number_format import Format

# Limits of `exmy`: values, ties and the sums that round them are normal f32 numbers.
_MIN_SUBNORMAL_EXPONENT = -125
_MAX_EXPONENT = 104


@dataclasses.dataclass(frozen=True)
class FloatFormat(Format):
    """A floating-point format: sign, exponent field, mantissa field, from high bits to low.

    Attributes:
      name: see `Format`; for 8 bits the part of the `ml_dtypes` name after ``float8_``.
      dtype: see `Format`.
      exponent_bits: width of the exponent field.
      mantissa_bits: width of the mantissa field, without the hidden bit.
      bias: exponent bias; the smallest normal number is ``2 ** (1 - bias)``.
      nonfinite: how many codes at the top of either sign are Inf or NaN: all of a binade in IEEE
        types, 1 in e4m3fn, none in MX element types.
      has_sign: whether negative numbers and zero exist (not in the scale type e8m0fnu).
      has_negative_zero: whether -0 exists; where it does not, its code is the only NaN (``*fnuz``).
      element: see `Format`.
      native_dtype: see `Format`.
    """

    name: str
    dtype: np.dtype
    exponent_bits: int
    mantissa_bits: int
    bias: int
    nonfinite: int = 0
    has_sign: bool = True
    has_negative_zero: bool = True
    element: bool = True
    native_dtype: np.dtype | None = None

    @property
    def layout(self) -> str:
        """Widths and bias."""
        return f"e{self.exponent_bits}m{self.mantissa_bits}, bias {self.bias}"

    @property
    def specials(self) -> str:
        """Which of Inf, NaN and -0 there are."""
        present = {
            "Inf": self.nonfinite > 1,
            "NaN": self.nan_code is not None,
            "-0": self.has_negative_zero,
        }
        return " ".join(word for word, there in present.items() if there)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.exponent_bits + self.mantissa_bits + self.has_sign

    @property
    def sign_bit(self) -> int:
        """The highest bit of a code."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """Code of `max`."""
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1 - self.nonfinite

    @functools.cached_property
    def max(self) -> float:
        """Largest finite value."""
        exponent, mantissa = divmod(self.max_code, 1 << self.mantissa_bits)
        return math.ldexp(1 + mantissa * self.epsilon, exponent - self.bias)

    @property
    def min_normal(self) -> float:
        """Smallest positive number with a full mantissa.

        Without a sign there is no zero: exponent field 0 is a number like all others.
        """
        return math.ldexp(1, (1 if self.has_sign else 0) - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number."""
        return self.min_normal * self.epsilon

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number, relative."""
        return 2.0**-self.mantissa_bits

    @property
    def underflow_bound(self) -> float:
        """Largest magnitude that rounds to zero: half of `min_subnormal` (ties go to even)."""
        return self.min_subnormal / 2

    @functools.cached_property
    def overflow_bound(self) -> float:
        """Largest f32 magnitude that rounds to `max`; beyond, casts clip.

        Half a step above `max`, or the f32 number below that where the tie would round up to an
        even mantissa (e5m2: 61440 overflows; e4m3fn: 464 does not).
        """
        step = math.ldexp(self.epsilon, self.max_exponent)
        tie = self.max + step / 2
        if round(self.max / step) % 2 == 0:
            return tie
        widest = float(np.finfo(np.float32).max)
        return float(np.nextafter(np.float32(tie), np.float32(0))) if tie < widest else widest

    @property
    def exact_in_bf16(self) -> bool:
        """Whether bf16 holds every finite value: 7 mantissa bits, 8 exponent bits."""
        return self.mantissa_bits <= 7 and self.min_subnormal >= 2.0**-133 and self.max < 2.0**128

    @property
    def nan_code(self) -> int | None:
        """Code of the quiet, positive NaN; None where there is none."""
        if self.nonfinite:
            return self.max_code + 1 + self.nonfinite // 2
        return None if self.has_negative_zero else self.sign_bit


def exmy(exponent_bits: int, mantissa_bits: int, bias: int | None = None) -> FloatFormat:
    """A float format of any widths up to 16 bits for studies, without Inf and NaN.

    Args:
      exponent_bits: 1 to 7 (with 8, f32 arithmetic could not emulate it).
      mantissa_bits: 0 or more. Without mantissa bits ties go up, as for e8m0fnu in `ml_dtypes`.
      bias: exponent bias, None for ``2 ** (exponent_bits - 1) - 1``.

    Returns:
      The format ``float_eXmY``, or ``float_eXmYbB`` with a bias of its own, held in uint8 or
      uint16. `get_format` knows it by this name without registration.

    Raises:
      ValueError: widths or a range that cannot be emulated.

    Example:
      >>> exmy(3, 5).max
      31.5
    """
    bits = 1 + exponent_bits + mantissa_bits
    if not (1 <= exponent_bits <= 7 and mantissa_bits >= 0 and bits <= 16):
        raise ValueError(
            f"exmy({exponent_bits}, {mantissa_bits}): use 1 to 7 exponent bits, 0 or more mantissa "
            "bits and 16 bits in all, the sign among them."
        )
    usual = (1 << (exponent_bits - 1)) - 1
    bias = usual if bias is None else bias
    lowest, top = 1 - bias - mantissa_bits, (1 << exponent_bits) - 1 - bias
    if lowest < _MIN_SUBNORMAL_EXPONENT or top > _MAX_EXPONENT:
        raise ValueError(
            f"exmy({exponent_bits}, {mantissa_bits}, bias={bias}): values from 2**{lowest} to the "
            f"binade of 2**{top}; allowed: from 2**{_MIN_SUBNORMAL_EXPONENT} to that of "
            f"2**{_MAX_EXPONENT}. The usual bias is {usual}."
        )
    name = f"float_e{exponent_bits}m{mantissa_bits}" + (f"b{bias}" if bias != usual else "")
    dtype = np.dtype(np.uint8 if bits <= 8 else np.uint16)
    return FloatFormat(name, dtype, exponent_bits, mantissa_bits, bias)
