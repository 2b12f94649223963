"""Formats given by a table of values."""

import dataclasses
import functools
import math

import ml_dtypes
import numpy as np

from lowprec_jax.numerics.number_format import Format

_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class CodebookFormat(Format):
    """A sorted table; the code of a value is its place. Codes are uint8.

    Attributes:
      name: see `Format`.
      values: 2 to 256 f32 numbers in increasing order.

    Raises:
      ValueError: a table that is too short or too long, not increasing, or not of f32 numbers.
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self):
        values = np.array(self.values, np.float64)
        good = np.isfinite(values) & ((values == 0) | (np.abs(values) >= _TINY))
        if not 2 <= len(values) <= 256:
            raise ValueError(f"CodebookFormat {self.name!r}: {len(values)} values; use 2 to 256.")
        if not (good.all() and (values.astype(np.float32) == values).all()):
            raise ValueError(
                f"CodebookFormat {self.name!r}: values have to be zero or normal f32 numbers; "
                "round them with float(np.float32(value))."
            )
        if not (np.diff(values) > 0).all() or values[-1] <= 0:
            raise ValueError(
                f"CodebookFormat {self.name!r}: values have to increase up to a positive one; sort "
                "them and leave repeats out."
            )

    @property
    def layout(self) -> str:
        """The size of the table."""
        return f"table of {len(self.values)}"

    @property
    def bits(self) -> int:
        """Bits that tell the values apart."""
        return (len(self.values) - 1).bit_length()

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    @functools.cached_property
    def zero_code(self) -> int:
        """Code of the value nearest to zero, which NaN becomes."""
        return int(np.argmin(np.abs(self.values)))

    @functools.cached_property
    def thresholds(self) -> tuple[float, ...]:
        """By code but the last: the largest f32 number that does not round to a higher code.

        The midpoint of two neighbours goes to the even code.
        """
        values = np.array(self.values, np.float64)
        middle = (values[:-1] + values[1:]) / 2  # of f32 numbers: exact in f64, unless far apart
        below = middle.astype(np.float32)
        odd = np.arange(len(middle)) % 2 == 1
        too_high = (below > middle) | (odd & (below == middle))
        return tuple(np.where(too_high, np.nextafter(below, np.float32(-np.inf)), below).tolist())

    @property
    def max(self) -> float:
        """Largest magnitude."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    @property
    def min_normal(self) -> float:
        """Smallest positive number."""
        return min(value for value in self.values if value > 0)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number."""
        return self.min_normal

    @functools.cached_property
    def epsilon(self) -> float:
        """The widest gap over the power of two of the largest binade."""
        return math.ldexp(float(np.diff(self.values).max()), -self.max_exponent)

    @property
    def mantissa_bits(self) -> int:
        """Whole bits of precision that the widest gap leaves."""
        return max(0, math.floor(-math.log2(self.epsilon)))

    @functools.cached_property
    def underflow_bound(self) -> float:
        """Largest magnitude that rounds to zero with either sign; 0 where zero is no value."""
        if 0.0 not in self.values:
            return 0.0
        code = self.zero_code
        above = self.thresholds[code] if code < len(self.thresholds) else math.inf
        if code == 0:
            return above
        first = np.nextafter(np.float32(self.thresholds[code - 1]), np.float32(np.inf))
        return min(above, -float(first))

    @property
    def overflow_bound(self) -> float:
        """Half a step beyond `max`, as for floats."""
        ends = self.values[1] - self.values[0], self.values[-1] - self.values[-2]
        return self.max + min(ends) / 2

    @functools.cached_property
    def exact_in_bf16(self) -> bool:
        """Whether every value is a bf16 number."""
        return bool((np.array(self.values, ml_dtypes.bfloat16).astype(float) == self.values).all())
