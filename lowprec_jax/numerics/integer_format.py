"""Symmetric integers and fixed-point numbers."""

import dataclasses

import numpy as np

from lowprec_jax.numerics.number_format import Format

# An amax times the reciprocal of its own scale passes `scale_max` by four f32 roundings at most.
_SLACK = 1 + 2.0**-21


@dataclasses.dataclass(frozen=True)
class IntegerFormat(Format):
    """Signed integers without the lowest code, ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1``.

    The value of a code is ``code * 2**-fraction_bits``. A scale maps the amax onto half a step more
    than the largest value (int8: 127.5), so that all codes stand for equally wide intervals, as in
    Qwix, AQT and compressed-tensors.

    Attributes:
      name: see `Format`.
      bits: width of a code, 2 to 16; held in int8 or int16.
      fraction_bits: bits behind the binary point; 6 in the INT8 of OCP MX 1.0.
      native_dtype: see `Format`.

    Raises:
      ValueError: a width or a number of fraction bits out of range.
    """

    name: str
    bits: int
    fraction_bits: int = 0
    native_dtype: np.dtype | None = None

    def __post_init__(self):
        if not (2 <= self.bits <= 16 and 0 <= self.fraction_bits <= 16):
            raise ValueError(
                f"IntegerFormat {self.name!r}: {self.bits} bits, {self.fraction_bits} fraction "
                "bits; use 2 to 16 bits and 0 to 16 fraction bits."
            )

    @property
    def layout(self) -> str:
        """Integer, or what a code `k` stands for."""
        return f"k / {2**self.fraction_bits}" if self.fraction_bits else "integer"

    @property
    def dtype(self) -> np.dtype:
        """int8, or int16 for more than 8 bits."""
        return np.dtype(np.int8 if self.bits <= 8 else np.int16)

    @property
    def max_code(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def step(self) -> float:
        """Distance of neighbours."""
        return 2.0**-self.fraction_bits

    @property
    def max(self) -> float:
        """Largest value."""
        return self.max_code * self.step

    @property
    def scale_max(self) -> float:
        """Half a step more than `max`."""
        return self.max + self.step / 2

    @property
    def min_normal(self) -> float:
        """The step: the numbers around zero are as precise as all others, in absolute terms."""
        return self.step

    @property
    def min_subnormal(self) -> float:
        """The step."""
        return self.step

    @property
    def mantissa_bits(self) -> int:
        """Bits of a code behind the leading one of the largest."""
        return self.bits - 2

    @property
    def epsilon(self) -> float:
        """The step over the power of two of the largest binade."""
        return 2.0**-self.mantissa_bits

    @property
    def underflow_bound(self) -> float:
        """Half a step: ties go to even."""
        return self.step / 2

    @property
    def overflow_bound(self) -> float:
        """`scale_max`, with room for the f32 roundings of a scale: an amax is in range."""
        return self.scale_max * _SLACK

    @property
    def exact_in_bf16(self) -> bool:
        """Whether 8 significant bits suffice."""
        return self.bits <= 9
