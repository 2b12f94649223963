"""Formats: limits against published tables, every code against three other libraries."""

import dataclasses
import sys

import gfloat
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest

from lowprec_jax import numerics
from lowprec_jax.numerics import FloatFormat, decode

FORMATS = numerics.formats()
# Those whose codes have a type of their own, in `ml_dtypes`; test_cast_emulated has the others.
NATIVE = [f for f in FORMATS if isinstance(f, FloatFormat) and f.dtype == f.native_dtype]
NARROW = [f for f in NATIVE if f.is_low_precision]
ELEMENTS = [f for f in NARROW if f.element]


def _decoded(fmt):
    return np.asarray(decode(jnp.asarray(oracles.all_codes(fmt.dtype)), fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_format__every_registered__has_the_published_limits(fmt):
    published = oracles.PUBLISHED_LIMITS[fmt.name]

    limits = (fmt.max, fmt.min_normal, fmt.min_subnormal, fmt.epsilon, "-0" in fmt.specials)

    assert limits == (*published[:4], published.negative_zero)


@pytest.mark.parametrize("fmt", NATIVE, ids=str)
def test_format__native_float__fields_agree_with_the_limits(fmt):
    published = oracles.PUBLISHED_LIMITS[fmt.name]

    assert fmt.bits == 8 * fmt.dtype.itemsize
    assert fmt.has_sign == (fmt.name != "e8m0fnu")
    assert fmt.element == (fmt.name != "e8m0fnu")
    assert published.epsilon == 2.0**-fmt.mantissa_bits
    if fmt.element:  # e8m0 has no subnormals: its smallest number is 2**-bias
        assert published.min_normal == 2.0 ** (1 - fmt.bias)
        assert published.min_subnormal == published.min_normal * published.epsilon


@pytest.mark.parametrize("fmt", [f for f in NATIVE if f.bits <= 16], ids=str)
def test_format__every_registered__has_the_published_special_codes(fmt):
    published = oracles.PUBLISHED_LIMITS[fmt.name]

    values = _decoded(fmt)

    assert np.isinf(values).sum() == published.infinities
    assert np.isnan(values).sum() == published.nans
    assert np.any((values == 0) & np.signbit(values)) == published.negative_zero


@pytest.mark.parametrize("fmt", [f for f in NATIVE if f.bits <= 16], ids=str)
def test_decode__every_code__equals_ml_dtypes(fmt):
    expected = oracles.f32(oracles.all_codes(fmt.dtype))

    oracles.assert_same_bits(_decoded(fmt), expected)


@pytest.mark.parametrize("fmt", [f for f in NATIVE if f.bits <= 16], ids=str)
def test_decode__every_code__equals_gfloat(fmt):
    if fmt.name not in oracles.GFLOAT_FORMATS:
        pytest.skip(f"gfloat does not know {fmt}")
    codes = oracles.all_codes(fmt.dtype).view(oracles.unsigned(fmt.dtype))

    expected = gfloat.decode_ndarray(oracles.GFLOAT_FORMATS[fmt.name], codes.astype(np.uint64))

    oracles.assert_same_bits(_decoded(fmt), expected.astype(np.float32))


@pytest.mark.parametrize("name", oracles.TORCH_DTYPES)
def test_decode__every_code__equals_torch(name):
    torch = pytest.importorskip("torch", reason="the torch oracle needs the extra 'oracle'")
    fmt = numerics.get_format(name)
    codes = oracles.all_codes(fmt.dtype).view(oracles.unsigned(fmt.dtype))

    tensor = torch.from_numpy(codes.copy()).view(getattr(torch, oracles.TORCH_DTYPES[name]))

    oracles.assert_same_bits(_decoded(fmt), tensor.to(torch.float32).numpy())


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_decode__to_bf16__is_exact(fmt):
    codes = jnp.asarray(oracles.all_codes(fmt.dtype))

    narrow = decode(codes, fmt, jnp.bfloat16)

    oracles.assert_same_bits(np.asarray(narrow).astype(np.float32), _decoded(fmt))


@pytest.mark.parametrize("fmt", [f for f in NATIVE if f.element], ids=str)
def test_overflow_bound__bare_cast__is_the_last_f32_that_rounds_to_max(fmt):
    bound = np.float32(fmt.overflow_bound)
    with np.errstate(over="ignore"):  # the next number after the largest f32 is Inf
        around = np.array([bound, np.nextafter(bound, np.float32(np.inf))])

    below, above = oracles.plain_cast(around, fmt.dtype).astype(np.float64)

    assert below == fmt.max
    assert not np.isfinite(above)


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_underflow_bound__bare_cast__is_the_last_f32_that_rounds_to_zero(fmt):
    bound = np.float32(fmt.underflow_bound)
    around = np.array([bound, np.nextafter(bound, np.float32(np.inf))])

    below, above = oracles.plain_cast(around, fmt.dtype).astype(np.float64)

    assert (below, above) == (0.0, fmt.min_subnormal)


@pytest.mark.parametrize("fmt", NATIVE, ids=str)
def test_nan_code__native_float__is_what_ml_dtypes_makes_of_nan(fmt):
    quiet = np.array(np.nan, np.float32).astype(fmt.dtype)

    assert fmt.nan_code == quiet.view(oracles.unsigned(fmt.dtype))


def test_nan_code__formats_without_nan__is_none():
    without = [f.name for f in FORMATS if f.nan_code is None]

    assert without == [f.name for f in FORMATS if f not in NATIVE]


def test_get_format__misspelt_name__names_the_nearest_and_all_known():
    with pytest.raises(ValueError, match=r"'e4m3fm'.*Known: .*e5m2.*Did you mean 'e4m3fn'\?"):
        numerics.get_format("e4m3fm")


def test_get_format__name_or_format__gives_the_registered_row():
    assert numerics.get_format("e5m2") is numerics.E5M2
    assert numerics.get_format(numerics.E5M2) is numerics.E5M2


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.native_dtype is not None], ids=str)
def test_format_of__native_type_of_every_format__finds_it(fmt):
    assert numerics.format_of(fmt.native_dtype) is fmt
    assert numerics.format_of(jnp.dtype(fmt.native_dtype).name) is fmt


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, np.float64, ml_dtypes.float6_e2m3fn])
def test_format_of__unregistered_type__raises_with_its_name(dtype):
    with pytest.raises(ValueError, match=jnp.dtype(dtype).name):
        numerics.format_of(dtype)


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("e4m3fn", jnp.float8_e4m3fn),
        ("e2m1", jnp.float4_e2m1fn),
        ("e2m3", None),
        ("int4", jnp.int4),
        ("int8", jnp.int8),
        ("int16", None),
        ("mxint8", None),
        ("nf4", None),
        ("float_e2m1", None),
    ],
)
def test_native_dtype__by_format__is_what_hardware_multiplies(name, native):
    assert numerics.get_format(name).native_dtype == (native and np.dtype(native))


def test_is_low_precision__compute_types__are_the_only_ones_that_are_not():
    assert [f.name for f in FORMATS if not f.is_low_precision] == ["bf16", "f16", "f32"]
    assert numerics.exmy(5, 9).is_low_precision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float_e3m5", numerics.exmy(3, 5)),
        ("float_e3m5b3", numerics.exmy(3, 5)),  # 3 is the usual bias
        ("float_e3m5b2", numerics.exmy(3, 5, bias=2)),
        ("float_e4m3b-1", numerics.exmy(4, 3, bias=-1)),
    ],
)
def test_get_format__widths_by_name__is_the_format_of_exmy_and_not_registered(name, expected):
    assert numerics.get_format(name) == expected
    assert numerics.get_format(expected.name) == expected
    assert expected not in numerics.formats()


def test_register_format__other_format_of_a_known_name__raises_and_changes_nothing():
    before = numerics.formats()
    other = dataclasses.replace(numerics.E4M3FN, bias=8)

    with pytest.raises(ValueError, match="'e4m3fn' is registered already"):
        numerics.register_format(other)

    assert numerics.formats() == before
    assert numerics.get_format("e4m3fn") is numerics.E4M3FN


def test_register_format__new_row__is_found_by_name_and_listed_last(monkeypatch):
    module = sys.modules[numerics.get_format.__module__]  # numerics.formats is the function
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
    row = dataclasses.replace(numerics.E5M2, name="gradient8")

    assert numerics.register_format(row) is row

    assert numerics.get_format("gradient8") is row
    assert numerics.formats() == (*FORMATS, row)


def test_format__as_static_argument__is_hashable_and_prints_its_name():
    assert len(set(FORMATS)) == len(FORMATS)
    assert f"{numerics.E4M3FN}" == "e4m3fn"
