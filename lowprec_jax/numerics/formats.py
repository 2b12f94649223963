"""Number formats as rows of data: what a format is, and the registry of those we know.

A format is described by its exponent and mantissa widths, its bias and how it treats infinities,
NaN and negative zero; limits are derived from `ml_dtypes.finfo`. Adding one is a `register_format`
call; no other module branches on a format's name.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lowprec_jax.errors import did_you_mean


@dataclasses.dataclass(frozen=True)
class Format:
    """A floating-point format.

    Attributes:
      name: registry name, the part of the `ml_dtypes` name after ``float8_`` (``"e4m3fn"``).
      dtype: storage type, also the type of the codes on the device.
      exponent_bits: width of the exponent field.
      mantissa_bits: width of the mantissa field, without the hidden bit.
      bias: exponent bias; the smallest normal number is ``2 ** (1 - bias)``.
      has_sign: whether negative numbers exist (not in the scale type e8m0fnu).
      has_negative_zero: whether -0 exists; where it does not, its code is the only NaN (``*fnuz``).
      element: whether tensors may be quantized to it; False for types that only hold scales.
    """

    name: str
    dtype: np.dtype
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_sign: bool = True
    has_negative_zero: bool = True
    element: bool = True

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.exponent_bits + self.mantissa_bits + self.has_sign

    @functools.cached_property
    def max(self) -> float:
        """Largest finite value."""
        return float(ml_dtypes.finfo(self.dtype).max)

    @property
    def min_normal(self) -> float:
        """Smallest positive number with a full mantissa."""
        return float(ml_dtypes.finfo(self.dtype).smallest_normal)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number."""
        return float(ml_dtypes.finfo(self.dtype).smallest_subnormal)

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
        top_exponent = math.frexp(self.max)[1] - 1
        tie = self.max + math.ldexp(1.0, top_exponent - self.mantissa_bits - 1)
        if round(math.ldexp(self.max, self.mantissa_bits - top_exponent)) % 2 == 0:
            return tie
        widest = float(np.finfo(np.float32).max)
        return float(np.nextafter(np.float32(tie), np.float32(0))) if tie < widest else widest

    @functools.cached_property
    def nan_code(self) -> int:
        """Bits of the NaN that a cast produces."""
        nan = np.array(np.nan, np.float32).astype(self.dtype)
        return int(nan.view(f"u{nan.itemsize}")) & ~(
            self._sign_bit if self.has_negative_zero else 0
        )

    @property
    def is_low_precision(self) -> bool:
        """Whether this is a format to quantize to (8 bits or fewer), not a compute type."""
        return self.bits <= 8

    @property
    def _sign_bit(self) -> int:
        return 1 << (self.bits - 1)

    def __str__(self) -> str:
        return self.name


_REGISTRY: dict[str, Format] = {}


def register_format(fmt: Format) -> Format:
    """Adds a format; every registered format runs through the conformance tests.

    Args:
      fmt: the format.

    Returns:
      The same format.

    Raises:
      ValueError: another format has this name.
    """
    if fmt.name in _REGISTRY and _REGISTRY[fmt.name] != fmt:
        raise ValueError(
            f"Format {fmt.name!r} is registered already as {_REGISTRY[fmt.name]!r}; "
            "choose another name."
        )
    _REGISTRY[fmt.name] = fmt
    return fmt


def get_format(name: "str | Format") -> Format:
    """Looks a format up by name; a `Format` is returned as it is.

    Raises:
      ValueError: no such name; the message lists the known names and the nearest.
    """
    if isinstance(name, Format):
        return name
    if name not in _REGISTRY:
        raise ValueError(
            f"Unknown format {name!r}. Known: {', '.join(_REGISTRY)}."
            + did_you_mean(name, _REGISTRY)
        )
    return _REGISTRY[name]


def formats() -> tuple[Format, ...]:
    """All registered formats, in the order of registration."""
    return tuple(_REGISTRY.values())


def format_of(dtype) -> Format:
    """The registered format whose storage type is `dtype`.

    Raises:
      ValueError: no registered format is stored as `dtype`.
    """
    for fmt in _REGISTRY.values():
        if fmt.dtype == jnp.dtype(dtype):
            return fmt
    raise ValueError(f"No registered format is stored as {jnp.dtype(dtype).name}.")


def _row(name: str, dtype, exponent_bits: int, mantissa_bits: int, bias: int, **flags) -> Format:
    return register_format(
        Format(name, np.dtype(dtype), exponent_bits, mantissa_bits, bias, **flags)
    )


# OCP OFP8 1.0 (NVIDIA, AMD MI350, TPU v7, Trainium 3); Micikevicius et al. 2022, arXiv:2209.05433.
E4M3FN = _row("e4m3fn", ml_dtypes.float8_e4m3fn, 4, 3, 7)
E5M2 = _row("e5m2", ml_dtypes.float8_e5m2, 5, 2, 15)
# IEEE-like: infinities take the top binade (Trainium 1 and 2).
E4M3 = _row("e4m3", ml_dtypes.float8_e4m3, 4, 3, 7)
E3M4 = _row("e3m4", ml_dtypes.float8_e3m4, 3, 4, 3)
# No infinities, no negative zero (AMD MI300); b11 is TPU v5 and v6.
E4M3FNUZ = _row("e4m3fnuz", ml_dtypes.float8_e4m3fnuz, 4, 3, 8, has_negative_zero=False)
E5M2FNUZ = _row("e5m2fnuz", ml_dtypes.float8_e5m2fnuz, 5, 2, 16, has_negative_zero=False)
E4M3B11FNUZ = _row("e4m3b11fnuz", ml_dtypes.float8_e4m3b11fnuz, 4, 3, 11, has_negative_zero=False)
# OCP MX 1.0 scale type: a power of two, no sign, no zero.
E8M0FNU = _row(
    "e8m0fnu",
    ml_dtypes.float8_e8m0fnu,
    8,
    0,
    127,
    has_sign=False,
    has_negative_zero=False,
    element=False,
)
# Compute types.
BF16 = _row("bf16", ml_dtypes.bfloat16, 8, 7, 127)
F16 = _row("f16", np.float16, 5, 10, 15)
F32 = _row("f32", np.float32, 8, 23, 127)
