"""Independent oracles in NumPy, `ml_dtypes` and gfloat. Imports nothing of the package under test.

Limits are typed in from the OCP specifications and the vendors' tables, not derived.
"""

import dataclasses
import functools
import importlib
import logging
import warnings
from typing import NamedTuple

import gfloat
import gfloat.formats
import gfloat.types
import ml_dtypes
import numpy as np
import pytest


class Limits(NamedTuple):
    """One row of the published tables; code counts are over all codes of the format."""

    max: float
    min_normal: float
    min_subnormal: float
    epsilon: float
    infinities: int
    nans: int
    negative_zero: bool


# OCP OFP8 1.0 table 1 and OCP MX 1.0; IEEE 754 for f16; AMD MI300, Google and AWS documentation for
# the others, as listed in the README of jax-ml/ml_dtypes.
PUBLISHED_LIMITS = {
    "e4m3fn": Limits(448.0, 2**-6, 2**-9, 1 / 8, 0, 2, True),
    "e5m2": Limits(57344.0, 2**-14, 2**-16, 1 / 4, 2, 6, True),
    "e4m3": Limits(240.0, 2**-6, 2**-9, 1 / 8, 2, 14, True),
    "e3m4": Limits(15.5, 2**-2, 2**-6, 1 / 16, 2, 30, True),
    "e4m3fnuz": Limits(240.0, 2**-7, 2**-10, 1 / 8, 0, 1, False),
    "e5m2fnuz": Limits(57344.0, 2**-15, 2**-17, 1 / 4, 0, 1, False),
    "e4m3b11fnuz": Limits(30.0, 2**-10, 2**-13, 1 / 8, 0, 1, False),
    "e8m0fnu": Limits(2.0**127, 2.0**-127, 2.0**-127, 1.0, 0, 1, False),
    "bf16": Limits((2 - 2**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2**-7, 2, 254, True),
    "f16": Limits(65504.0, 2**-14, 2**-24, 2**-10, 2, 2046, True),
    "f32": Limits((2 - 2**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2**-23, 2, 2**24 - 2, True),
    "e2m1": Limits(6.0, 1.0, 0.5, 1 / 2, 0, 0, True),
    "e2m3": Limits(7.5, 1.0, 0.125, 1 / 8, 0, 0, True),
    "e3m2": Limits(28.0, 0.25, 0.0625, 1 / 4, 0, 0, True),
    "int4": Limits(7.0, 1.0, 1.0, 1 / 4, 0, 0, False),
    "int8": Limits(127.0, 1.0, 1.0, 1 / 64, 0, 0, False),
    "int16": Limits(32767.0, 1.0, 1.0, 2**-14, 0, 0, False),
    "mxint8": Limits(1.984375, 1 / 64, 1 / 64, 1 / 64, 0, 0, False),
    "nf4": Limits(1.0, 0.07958029955625534, 0.07958029955625534, 0.30380719900131226, 0, 0, False),
}
for _bits in {*range(2, 17)} - {4, 8, 16}:
    _max = 2 ** (_bits - 1) - 1
    PUBLISHED_LIMITS[f"int{_bits}"] = Limits(float(_max), 1.0, 1.0, 2.0 ** (2 - _bits), 0, 0, False)

# Formats that `ml_dtypes` has. Those of 4 and 6 bits have one code in a byte, in the low bits.
ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
}

_E4M3 = gfloat.formats.format_info_ocp_e4m3
_IEEE = {"domain": gfloat.types.Domain.Extended}
_SIGNED, _FINITE = gfloat.types.Signedness.Signed, gfloat.types.Domain.Finite
_P3109_P4 = gfloat.formats.format_info_p3109(8, 4, _SIGNED, _FINITE)

# Formats gfloat names, and those it can describe: a "uz" format is IEEE P3109's finite one.
GFLOAT_FORMATS = {
    "e4m3fn": _E4M3,
    "e5m2": gfloat.formats.format_info_ocp_e5m2,
    "e4m3": dataclasses.replace(_E4M3, name="e4m3", num_high_nans=7, **_IEEE),
    "e3m4": dataclasses.replace(_E4M3, name="e3m4", precision=5, bias=3, num_high_nans=15, **_IEEE),
    "e4m3fnuz": _P3109_P4,
    "e5m2fnuz": gfloat.formats.format_info_p3109(8, 3, _SIGNED, _FINITE),
    "e4m3b11fnuz": dataclasses.replace(_P3109_P4, name="e4m3b11fnuz", bias=11),
    "e8m0fnu": gfloat.formats.format_info_ocp_e8m0,
    "bf16": gfloat.formats.format_info_bfloat16,
    "f16": gfloat.formats.format_info_binary16,
    "f32": gfloat.formats.format_info_binary32,
    "e2m1": gfloat.formats.format_info_ocp_e2m1,
    "e2m3": gfloat.formats.format_info_ocp_e2m3,
    "e3m2": gfloat.formats.format_info_ocp_e3m2,
}

TORCH_DTYPES = {
    "e4m3fn": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2fnuz": "float8_e5m2fnuz",
    "e8m0fnu": "float8_e8m0fnu",
    "bf16": "bfloat16",
    "f16": "float16",
}


def f32(x) -> np.ndarray:
    """As f32, exact for every narrower type; a signalling NaN is no reason to warn."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x).astype(np.float32)


def f64(x) -> np.ndarray:
    """As f64, exact."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x).astype(np.float32).astype(np.float64)


def unsigned(dtype) -> np.dtype:
    """The unsigned integer type as wide as `dtype`."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def all_codes(dtype) -> np.ndarray:
    """Every code of an 8- or 16-bit type, as that type."""
    codes = unsigned(dtype)
    return np.arange(2 ** (8 * codes.itemsize), dtype=np.uint32).astype(codes).view(dtype)


@functools.cache
def finite_values(dtype) -> np.ndarray:
    """Every finite value of an 8- or 16-bit type, f64, sorted, without repeats."""
    values = f64(all_codes(dtype))
    return np.unique(values[np.isfinite(values)])


def plain_cast(x: np.ndarray, dtype) -> np.ndarray:
    """The bare conversion of `ml_dtypes`, from f32."""
    with np.errstate(all="ignore"):
        return f32(x).astype(dtype)


def saturating_cast(x: np.ndarray, dtype) -> np.ndarray:
    """Clips to the largest finite value, then converts with `ml_dtypes`."""
    return plain_cast(clip(x, float(ml_dtypes.finfo(dtype).max)), dtype)


def clip(x: np.ndarray, limit: float) -> np.ndarray:
    """f32; NaN and the sign of zero survive."""
    x, limit = f32(x), np.float32(limit)
    return np.where(np.abs(x) > limit, np.copysign(limit, x), x)


def gfloat_info(exponent_bits: int, mantissa_bits: int, bias: int) -> gfloat.types.FormatInfo:
    """gfloat's description of a format without Inf and NaN."""
    return dataclasses.replace(
        gfloat.formats.format_info_ocp_e3m2,
        name="finite",
        k=1 + exponent_bits + mantissa_bits,
        precision=mantissa_bits + 1,
        bias=bias,
    )


def gfloat_cast(x: np.ndarray, fmt: "str | gfloat.types.FormatInfo") -> np.ndarray:
    """Codes (u64) of gfloat's own rounding, nearest even, saturating."""
    info = GFLOAT_FORMATS[fmt] if isinstance(fmt, str) else fmt
    wide = f64(x)
    with np.errstate(all="ignore"):
        rounded = gfloat.round_ndarray(info, wide, gfloat.types.RoundMode.TiesToEven, sat=True)
        return gfloat.encode_ndarray(info, rounded)


def float_magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """f64: the magnitudes of a format without Inf and NaN, by code: the IEEE 754 formula."""
    exponent = np.arange(2**exponent_bits, dtype=np.float64)[:, None]
    fraction = np.arange(2**mantissa_bits, dtype=np.float64) / 2**mantissa_bits
    hidden = (exponent > 0).astype(np.float64)
    return ((hidden + fraction) * 2.0 ** (np.maximum(exponent, 1) - bias)).ravel()


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Places in an f64 grid of the values nearest to `x`; ties to the even place."""
    x = np.asarray(x, np.float64)
    high = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    low = high - 1
    x = np.clip(x, grid[0], grid[-1])
    below, above = x - grid[low], grid[high] - x
    up = (above < below) | ((above == below) & (high % 2 == 0))
    return np.where(up, high, low)


def mixed_magnitudes(smallest: float, largest: float, size: int = 2**20) -> np.ndarray:
    """f32 [size]: both signs, binades from `smallest` / 8 to 8 `largest`, the special values."""
    rng = np.random.default_rng(11)
    exponents = rng.uniform(np.log2(smallest) - 3, np.log2(largest) + 3, size)
    x = (rng.choice([-1.0, 1.0], size) * 2.0**exponents).astype(np.float32)
    special = special_values()
    x[: len(special)] = special
    return x


def ties(dtype) -> np.ndarray:
    """`grid_ties` of the finite values of an 8- or 16-bit type."""
    return grid_ties(finite_values(dtype))


def grid_ties(values: np.ndarray) -> np.ndarray:
    """f32: format values, midpoints between neighbours, overflow ties, each with ±1 ulp."""
    step = values[-1] - values[-2]
    beyond = np.array([values[-1] + step / 2, values[-1] + step])
    points = np.concatenate([values, (values[:-1] + values[1:]) / 2, beyond, -beyond])
    with np.errstate(all="ignore"):
        points = points.astype(np.float32)
    down, up = (np.nextafter(points, np.float32(s)) for s in (-np.inf, np.inf))
    return np.concatenate([points, down, up])


def special_values() -> np.ndarray:
    """f32: both zeros, infinities, NaN of either sign, the largest numbers, subnormals."""
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    magnitudes = np.array(
        [0, np.inf, 3e38, 3.4028235e38, 2.0**-126, 1.1e-38, 1e-40, 1e-45], np.float32
    )
    return np.concatenate([nans, magnitudes, -magnitudes])


@functools.cache
def cast_inputs(fmt_dtype, x_dtype) -> np.ndarray:
    """What a cast is tried on.

    Every code of a 16-bit input type. For f32: every value of f16 and bf16, all ties of the format,
    the special values and 2**17 random bit patterns.
    """
    if np.dtype(x_dtype).itemsize == 2:
        return all_codes(x_dtype)
    random = np.random.default_rng(0).integers(0, 2**32, 2**17, np.uint32).view(np.float32)
    sixteen_bit = [f32(all_codes(d)) for d in (np.float16, ml_dtypes.bfloat16)]
    grid = [ties(fmt_dtype)] if np.dtype(fmt_dtype).itemsize <= 2 else []
    return np.concatenate([*sixteen_bit, *grid, special_values(), random])


def assert_same_bits(actual, expected) -> None:
    """Equal NaN masks, and equal bits elsewhere: values, and the sign of zero."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    nan, expected_nan = (np.isnan(f32(a)) for a in (actual, expected))
    np.testing.assert_array_equal(nan, expected_nan, err_msg="NaN masks")
    bits = unsigned(actual.dtype)
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def scale_from_amax(amax, format_max: float, margin: int = 0, fallback: float = 1.0) -> np.ndarray:
    """amax * (1 / max) * 2**margin in f32; bounded so that it and its reciprocal are normal."""
    smallest, largest = np.float32(2.0**-126), np.float32(2.0**126)
    amax = np.asarray(amax, np.float32)
    inverse = max(np.float32(1) / np.float32(format_max), smallest)
    factor = np.float32(inverse * np.float32(2.0**margin))
    with np.errstate(all="ignore"):
        scale = np.minimum(np.maximum(amax * factor, smallest), largest)
    good = np.isfinite(amax) & (amax >= smallest)
    return np.where(good, scale, np.float32(fallback))


def quantize(x: np.ndarray, dtype, scale) -> np.ndarray:
    """Codes of x * (1 / scale), all in f32."""
    return saturating_cast(f32(x) * (np.float32(1) / np.asarray(scale, np.float32)), dtype)


def neighbours(x: float, dtype) -> tuple[float, float]:
    """The format values around `x`: both `x` if it is one, both the largest if it is beyond."""
    values = finite_values(dtype)
    x = min(max(x, values[0]), values[-1])
    return values[values <= x][-1], values[values >= x][0]


def sqnr_db(reference: np.ndarray, approximation: np.ndarray) -> float:
    """20 log10(|ref| / |ref - approx|), f64."""
    reference, approximation = (np.asarray(a, np.float64) for a in (reference, approximation))
    noise = np.sqrt(np.sum((reference - approximation) ** 2))
    return float(20 * np.log10(np.sqrt(np.sum(reference**2)) / noise))


class RangeCounts(NamedTuple):
    """Counts by what a bare cast does: overflows to a non-finite value, or vanishes."""

    amax: float
    saturated: int
    underflow: int
    nonfinite: int


def range_counts(x: np.ndarray, scale, dtype) -> RangeCounts:
    """Looks at the outcome of the bare cast; knows no thresholds."""
    x = f32(x)
    with np.errstate(all="ignore"):
        codes = plain_cast(x * (np.float32(1) / np.asarray(scale, np.float32)), dtype)
    decoded = f32(codes)
    return RangeCounts(
        amax=np.max(np.abs(x), initial=0),
        saturated=int(np.sum(~np.isfinite(decoded) & ~np.isnan(x))),
        underflow=int(np.sum((decoded == 0) & (x != 0))),
        nonfinite=int(np.sum(~np.isfinite(x))),
    )


@functools.cache
def torchao(module: str):
    """torch and a module of torchao, or a skip; its import warns of C++ operators of no use."""
    reason = "the torchao oracle needs the extra 'oracle'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            torch = pytest.importorskip("torch", reason=reason)
            pytest.importorskip("torchao", reason=reason)
            return torch, importlib.import_module(f"torchao.{module}")
        finally:
            logging.disable(logging.NOTSET)


def torchao_mx(x: np.ndarray, name: str, rule: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """u8 scales and u8 elements of `to_mx`, along the last axis; e2m1 elements in packed pairs."""
    torch, mx = torchao("prototype.mx_formats.mx_tensor")
    elements = {
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m3": mx.DTYPE_FP6_E2M3,
        "e3m2": mx.DTYPE_FP6_E3M2,
        "e2m1": torch.float4_e2m1fn_x2,
    }
    mode = mx.ScaleCalculationMode[rule.upper()]
    scales, data = mx.to_mx(torch.from_numpy(x.copy()), elements[name], block, mode)
    return scales.view(torch.uint8).numpy(), data.view(torch.uint8).numpy()


def torchao_nvfp4(x: np.ndarray, global_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """u8 scales and u8 packed pairs of `nvfp4_quantize`, along the last of two axes."""
    torch, nvfp4 = torchao("prototype.mx_formats.nvfp4_tensor")
    scale = torch.tensor(global_scale, dtype=torch.float32)
    scales, data = nvfp4.nvfp4_quantize(torch.from_numpy(x.copy()), 16, scale)
    return scales.view(torch.uint8).numpy(), data.numpy()


_ELEMENT_DTYPES = {
    "e4m3fn": (8, ml_dtypes.float8_e4m3fn),
    "e5m2": (8, ml_dtypes.float8_e5m2),
    "e2m3": (6, ml_dtypes.float6_e2m3fn),
    "e3m2": (6, ml_dtypes.float6_e3m2fn),
    "e2m1": (4, ml_dtypes.float4_e2m1fn),
}


def element_values(codes: np.ndarray, name: str) -> np.ndarray:
    """f64 values of u8 codes of an MX element format."""
    return f64(codes.view(_ELEMENT_DTYPES[name][1]))


def element_codes(x: np.ndarray, name: str) -> np.ndarray:
    """u8 codes of the nearest elements of an MX format, ties to even, saturating, by search."""
    if name == "mxint8":
        return np.clip(np.rint(x * 64), -127, 127).astype(np.int8).view(np.uint8)
    bits, _ = _ELEMENT_DTYPES[name]
    values = element_values(np.arange(2 ** (bits - 1), dtype=np.uint8), name)
    values = values[np.isfinite(values)]
    middles = (values[:-1] + values[1:]) / 2
    code = np.searchsorted(middles, np.abs(x))  # a tie is with the lower neighbour
    tie = np.isin(np.abs(x), middles) & (code % 2 == 1)
    return (code + tie + (np.signbit(x) << (bits - 1))).astype(np.uint8)
