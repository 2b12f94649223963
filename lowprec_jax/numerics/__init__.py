"""Formats, amax, scale, cast, scaled arrays, diagnostics: pure functions on arrays.

Imports JAX, NumPy and `ml_dtypes` only.
"""

from lowprec_jax.numerics.casting import Rounding, cast, upcast
from lowprec_jax.numerics.diagnostics import (
    RangeStatistics,
    range_statistics,
    saturated_fraction,
    sqnr_db,
    underflow_fraction,
)
from lowprec_jax.numerics.formats import (
    BF16,
    E3M4,
    E4M3,
    E4M3B11FNUZ,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0FNU,
    F16,
    F32,
    Format,
    format_of,
    formats,
    get_format,
    register_format,
)
from lowprec_jax.numerics.scaled_array import ScaledArray, dequantize, fake_quantize, quantize
from lowprec_jax.numerics.scaling import (
    MAX_SCALE,
    MIN_AMAX,
    MIN_SCALE,
    compute_amax,
    reciprocal,
    round_up_to_power_of_two,
    scale_from_amax,
    usable,
)

__all__ = [
    "BF16",
    "E3M4",
    "E4M3",
    "E4M3B11FNUZ",
    "E4M3FN",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "E8M0FNU",
    "F16",
    "F32",
    "MAX_SCALE",
    "MIN_AMAX",
    "MIN_SCALE",
    "Format",
    "RangeStatistics",
    "Rounding",
    "ScaledArray",
    "cast",
    "compute_amax",
    "dequantize",
    "fake_quantize",
    "format_of",
    "formats",
    "get_format",
    "quantize",
    "range_statistics",
    "reciprocal",
    "register_format",
    "round_up_to_power_of_two",
    "saturated_fraction",
    "scale_from_amax",
    "sqnr_db",
    "underflow_fraction",
    "upcast",
    "usable",
]
