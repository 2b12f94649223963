"""Formats, amax, scale, cast, scaled arrays, diagnostics: pure functions on arrays.

Imports JAX, NumPy and `ml_dtypes` only.
"""

from lowprec_jax.numerics.block_scales import (
    E8M0_RULES,
    E8M0Rule,
    e8m0_code,
    e8m0_value,
    nvfp4_scales,
    scale_down,
    scale_up,
)
from lowprec_jax.numerics.casting import Rounding, cast, cast_with_values, decode
from lowprec_jax.numerics.codebook_format import CodebookFormat
from lowprec_jax.numerics.diagnostics import (
    RangeStatistics,
    range_row,
    range_statistics,
    saturated_fraction,
    sqnr_db,
    underflow_fraction,
)
from lowprec_jax.numerics.float_casting import narrow_to_bf16
from lowprec_jax.numerics.float_format import FloatFormat, exmy
from lowprec_jax.numerics.formats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
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
    INT4,
    INT8,
    MXINT8,
    NF4,
    Format,
    format_of,
    formats,
    get_format,
    register_format,
)
from lowprec_jax.numerics.hadamard import hadamard_rotate
from lowprec_jax.numerics.integer_format import IntegerFormat
from lowprec_jax.numerics.mx import dequantize_mx, quantize_mx
from lowprec_jax.numerics.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from lowprec_jax.numerics.packing import pack_4bit, unpack_4bit
from lowprec_jax.numerics.quantizer import Quantizer, as_quantizer
from lowprec_jax.numerics.scaled_array import ScaledArray, dequantize, fake_quantize, quantize
from lowprec_jax.numerics.scaling import (
    MAX_SCALE,
    MIN_AMAX,
    MIN_SCALE,
    compute_amax,
    reciprocal,
    round_up_to_power_of_two,
    scale_factor,
    scale_from_amax,
    scale_from_history,
    usable,
)
from lowprec_jax.numerics.tiles import Tile, spread

__all__ = [
    "BF16",
    "E2M1",
    "E2M3",
    "E3M2",
    "E3M4",
    "E4M3",
    "E4M3B11FNUZ",
    "E4M3FN",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "E8M0FNU",
    "E8M0_RULES",
    "F16",
    "F32",
    "INT4",
    "INT8",
    "MAX_SCALE",
    "MIN_AMAX",
    "MIN_SCALE",
    "MXINT8",
    "NF4",
    "CodebookFormat",
    "E8M0Rule",
    "FloatFormat",
    "Format",
    "IntegerFormat",
    "Quantizer",
    "RangeStatistics",
    "Rounding",
    "ScaledArray",
    "Tile",
    "as_quantizer",
    "cast",
    "cast_with_values",
    "compute_amax",
    "decode",
    "dequantize",
    "dequantize_mx",
    "dequantize_nvfp4",
    "e8m0_code",
    "e8m0_value",
    "exmy",
    "fake_quantize",
    "format_of",
    "formats",
    "get_format",
    "hadamard_rotate",
    "narrow_to_bf16",
    "nvfp4_scales",
    "pack_4bit",
    "quantize",
    "quantize_mx",
    "quantize_nvfp4",
    "range_row",
    "range_statistics",
    "reciprocal",
    "register_format",
    "round_up_to_power_of_two",
    "saturated_fraction",
    "scale_down",
    "scale_factor",
    "scale_from_amax",
    "scale_from_history",
    "scale_up",
    "spread",
    "sqnr_db",
    "underflow_fraction",
    "unpack_4bit",
    "usable",
]
