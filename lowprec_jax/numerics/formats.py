"""The registry: the number formats we know, as rows of data.

Adding one is a `register_format` call; no other module branches on a format's name. Which chips
take a format is in `lowprec_jax.recipes.target`.
"""

import re
from typing import TypeVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lowprec_jax.errors import did_you_mean
from lowprec_jax.numerics.codebook_format import CodebookFormat
from lowprec_jax.numerics.float_format import FloatFormat, exmy
from lowprec_jax.numerics.integer_format import IntegerFormat
from lowprec_jax.numerics.number_format import Format

_REGISTRY: dict[str, Format] = {}

F = TypeVar("F", bound=Format)


def register_format(fmt: F) -> F:
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

    Besides the registered names, ``float_e3m5`` and ``float_e3m5b2`` name the formats of `exmy`:
    3 exponent and 5 mantissa bits, without Inf and NaN, of the usual bias or of bias 2. (The
    registered ``e3m4`` is IEEE-like: the first is another format than ``float_e3m4``.)

    Raises:
      ValueError: no such name; the message lists the known names and the nearest.
    """
    if isinstance(name, Format):
        return name
    if name in _REGISTRY:
        return _REGISTRY[name]
    if widths := re.fullmatch(r"float_e(\d+)m(\d+)(?:b(-?\d+))?", name):
        return exmy(*(int(width) for width in widths.groups() if width is not None))
    raise ValueError(
        f"Unknown format {name!r}. Known: {', '.join(_REGISTRY)}, and float_eXmY for any widths."
        + did_you_mean(name, _REGISTRY)
    )


def formats() -> tuple[Format, ...]:
    """All registered formats, in the order of registration."""
    return tuple(_REGISTRY.values())


def format_of(dtype) -> Format:
    """The registered format of the numbers of a JAX type: its `Format.native_dtype`.

    Raises:
      ValueError: no registered format has this type.
    """
    for fmt in _REGISTRY.values():
        if fmt.native_dtype is not None and fmt.native_dtype == jnp.dtype(dtype):
            return fmt
    raise ValueError(f"No registered format has the type {jnp.dtype(dtype).name}.")


def _float(name: str, dtype, exponent: int, mantissa: int, bias: int, **fields) -> FloatFormat:
    """A row whose codes have a type of their own."""
    dtype = np.dtype(dtype)
    return register_format(
        FloatFormat(name, dtype, exponent, mantissa, bias, native_dtype=dtype, **fields)
    )


def _mx_float(name: str, exponent: int, mantissa: int, bias: int, native=None) -> FloatFormat:
    """A row of an MX element type: codes in uint8, because XLA has no arrays of them everywhere."""
    return register_format(
        FloatFormat(
            name,
            np.dtype(np.uint8),
            exponent,
            mantissa,
            bias,
            native_dtype=native and np.dtype(native),
        )
    )


def _integer(bits: int, native=None) -> IntegerFormat:
    native = native and np.dtype(native)
    return register_format(IntegerFormat(f"int{bits}", bits, native_dtype=native))


# OCP OFP8 1.0; Micikevicius et al. 2022, arXiv:2209.05433.
E4M3FN = _float("e4m3fn", ml_dtypes.float8_e4m3fn, 4, 3, 7, nonfinite=1)
E5M2 = _float(
    "e5m2",
    ml_dtypes.float8_e5m2,
    5,
    2,
    15,
    nonfinite=4,
)
# IEEE-like: infinities and NaN take the top binade.
E4M3 = _float("e4m3", ml_dtypes.float8_e4m3, 4, 3, 7, nonfinite=8)
E3M4 = _float("e3m4", ml_dtypes.float8_e3m4, 3, 4, 3, nonfinite=16)
# No infinities, no negative zero; Noune et al. 2022, arXiv:2206.02915.
_FNUZ = {"has_negative_zero": False}
E4M3FNUZ = _float("e4m3fnuz", ml_dtypes.float8_e4m3fnuz, 4, 3, 8, **_FNUZ)
E5M2FNUZ = _float("e5m2fnuz", ml_dtypes.float8_e5m2fnuz, 5, 2, 16, **_FNUZ)
E4M3B11FNUZ = _float(
    "e4m3b11fnuz",
    ml_dtypes.float8_e4m3b11fnuz,
    4,
    3,
    11,
    **_FNUZ,
)
# OCP MX 1.0 scale type: a power of two, no sign, no zero.
E8M0FNU = _float(
    "e8m0fnu",
    ml_dtypes.float8_e8m0fnu,
    8,
    0,
    127,
    nonfinite=1,
    has_sign=False,
    has_negative_zero=False,
    element=False,
)
# OCP MX 1.0 element types: every code is a number.
E2M1 = _mx_float("e2m1", 2, 1, 1, native=ml_dtypes.float4_e2m1fn)
E2M3 = _mx_float("e2m3", 2, 3, 1)
E3M2 = _mx_float("e3m2", 3, 2, 3)
# Integers; 127 codes of either sign in int8.
INT2, INT3 = _integer(2), _integer(3)
INT4 = _integer(4, ml_dtypes.int4)
INT5, INT6, INT7 = _integer(5), _integer(6), _integer(7)
INT8 = _integer(8, np.int8)
for _bits in range(9, 17):
    _integer(_bits)
# The INT8 element of OCP MX 1.0: k / 64.
MXINT8 = register_format(IntegerFormat("mxint8", 8, fraction_bits=6))
# 4-bit NormalFloat, Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = register_format(
    CodebookFormat(
        "nf4",
        (
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
    )
)
# Compute types.
BF16 = _float("bf16", ml_dtypes.bfloat16, 8, 7, 127, nonfinite=2**7)
F16 = _float("f16", np.float16, 5, 10, 15, nonfinite=2**10)
F32 = _float("f32", np.float32, 8, 23, 127, nonfinite=2**23)
