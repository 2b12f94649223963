"""MX and NVFP4 as stored, end to end: codes and scales against torchao, gfloat and NumPy f64."""

import functools

import gfloat
import gfloat.block
import gfloat.formats
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lowprec_jax.numerics import (
    E8M0_RULES,
    dequantize_mx,
    dequantize_nvfp4,
    pack_4bit,
    quantize_mx,
    quantize_nvfp4,
)

MX_ELEMENTS = ("e4m3fn", "e5m2", "e2m3", "e3m2", "e2m1", "mxint8")
GFLOAT_BLOCKS = {
    "e4m3fn": "mxfp8_e4m3",
    "e5m2": "mxfp8_e5m2",
    "e2m3": "mxfp6_e2m3",
    "e3m2": "mxfp6_e3m2",
    "e2m1": "mxfp4_e2m1",
    "mxint8": "mxint8",
}
MX = jax.jit(quantize_mx, static_argnums=(1, 2), static_argnames=("block", "axis"))
MX_VALUES = jax.jit(dequantize_mx, static_argnums=2, static_argnames="axis")
NVFP4_VALUES = jax.jit(dequantize_nvfp4, static_argnames="axis")
NVFP4 = jax.jit(quantize_nvfp4, static_argnames=("four_over_six", "axis", "scale_min"))
TORCHAO_SCALE_MIN = 2.0**-6


@functools.cache
def mixed(block: int, seed: int = 0) -> np.ndarray:
    """f32 [n, block], 5 * 2**18 finite values: blocks of every magnitude and kind."""
    rng = np.random.default_rng(seed)
    n = 5 * 2**18 // block
    x = rng.standard_normal((n, block)) * np.exp2(rng.uniform(-12, 0, (n, block)))
    x = np.ldexp(x, rng.integers(-145, 124, (n, 1)))
    grid = rng.integers(-24, 25, (n, block)) * np.ldexp(1.0, rng.integers(-140, 120, (n, 1)))
    bits = rng.integers(0, 2**32, (n, block), np.uint32)
    with np.errstate(all="ignore"):
        kinds = [
            x.astype(np.float32),
            grid.astype(np.float32),  # ties of the element formats
            (bits & 0xFF7FFFFF).view(np.float32),  # any finite value next to any other
            (bits & 0x807FFFFF).view(np.float32),  # subnormals
            np.repeat(x[:, :1], block, 1).astype(np.float32),  # constant
            np.zeros((n, block), np.float32),
            np.where(bits & 3, grid, 3e38).astype(np.float32),
        ]
    kind = rng.choice(len(kinds), (n, 1), p=[0.6, 0.2, 0.06, 0.04, 0.04, 0.02, 0.04])
    return np.choose(kind, kinds)


def bits_of(codes) -> np.ndarray:
    codes = np.asarray(codes)
    return codes.view(np.uint8)


def packed(codes, name):
    return pack_4bit(codes) if name == "e2m1" else codes


@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("name", MX_ELEMENTS[:-1])
def test_quantize_mx__a_million_values__equals_torchao(name, rule):
    x = mixed(32)

    codes, scales = MX(jnp.asarray(x), name, rule)

    expected_scales, expected = oracles.torchao_mx(x, name, rule, block=32)
    scales = np.asarray(scales)
    sound = np.ones(len(x), bool)
    if rule == "rceil":  # just above a power of two the f32 logarithm of torchao is one
        quotient = np.abs(x.astype(np.float64)).max(1) / oracles.PUBLISHED_LIMITS[name].max
        sound = 2 * np.frexp(quotient)[0] % 1 > 2.0**-17
        sound |= np.isin(np.frexp(quotient)[0], (0, 0.5))
        assert sound.mean() > 0.99
    np.testing.assert_array_equal(scales[sound, 0], expected_scales[sound, 0])
    # In blocks of scale 2**-127 torchao divides by 2**-126, or by 1: see the exact test below.
    compared = sound & (scales[:, 0] > 0)
    assert compared.sum() * 32 > 10**6
    np.testing.assert_array_equal(bits_of(packed(codes, name))[compared], expected[compared])


@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_quantize_mx__a_million_values__are_the_nearest_elements(name, rule):
    """Given the scales, the nearest element to ``x / 2**(c - 127)`` in f64, scale 2**-127 too."""
    x = mixed(32)

    codes, scales = MX(jnp.asarray(x), name, rule)

    scaled = np.ldexp(x.astype(np.float64), 127 - np.asarray(scales).astype(int))
    np.testing.assert_array_equal(bits_of(codes), oracles.element_codes(scaled, name))


def gfloat_mx(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Element codes, E8M0 scale codes [n, 1] and f64 values of rows of f64, as gfloat has them."""
    info = getattr(gfloat.formats, f"format_info_{GFLOAT_BLOCKS[name]}")
    scales = [[gfloat.block.compute_scale_amax(info.etype.emax, row)] for row in x]
    scale_codes = gfloat.encode_ndarray(info.stype, np.array(scales))
    scales = gfloat.decode_ndarray(info.stype, scale_codes.astype(np.int64))
    codes = gfloat.encode_ndarray(
        info.etype, gfloat.round_ndarray(info.etype, x / scales, sat=True)
    ).astype(np.int64)
    return codes, scale_codes, gfloat.decode_ndarray(info.etype, codes) * scales


@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_quantize_mx__floor_a_million_values__equals_gfloat(name):
    x = mixed(32, seed=1)

    codes, scales = MX(jnp.asarray(x), name, "floor")
    values = np.asarray(MX_VALUES(codes, scales, name), np.float64)

    expected, expected_scales, expected_values = gfloat_mx(x.astype(np.float64), name)
    if name == "mxint8":  # gfloat has -128, which our symmetric integers do not
        lowest = expected == 128
        assert lowest.mean() > 1e-4
        unit = np.ldexp(1.0, expected_scales.astype(int) - 127) / 64
        expected_values = np.where(lowest, -127 * unit, expected_values)
        expected = np.where(lowest, 129, expected)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(bits_of(codes), expected)
    np.testing.assert_array_equal(values, expected_values)


def test_gfloat_mx__blocks__are_those_of_its_scalar_functions():
    """The vectorized functions of the oracle against its plain ones, every element."""
    x = mixed(32, seed=2)[:4].astype(np.float64)
    for name, block in GFLOAT_BLOCKS.items():
        info = getattr(gfloat.formats, f"format_info_{block}")
        for row, *found in zip(x, *gfloat_mx(x, name), strict=True):
            scale = gfloat.block.compute_scale_amax(info.etype.emax, row)
            encoded = list(gfloat.block.encode_block(info, scale, row / scale))
            assert encoded == [*found[1], *found[0]]
            assert list(gfloat.block.decode_block(info, encoded)) == list(found[2])


@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_dequantize_mx__tiny_blocks__are_as_exact_as_large_ones(name):
    x = np.random.default_rng(4).standard_normal((64, 32)).astype(np.float32)
    codes, scales = MX(jnp.asarray(x), name)
    tiny = np.ldexp(x, -110)

    tiny_codes, tiny_scales = MX(jnp.asarray(tiny), name)

    np.testing.assert_array_equal(bits_of(tiny_codes), bits_of(codes))
    np.testing.assert_array_equal(tiny_scales, np.asarray(scales) - 110)
    values = np.asarray(MX_VALUES(tiny_codes, tiny_scales, name))
    np.testing.assert_array_equal(values, np.ldexp(MX_VALUES(codes, scales, name), -110))


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_quantize_mx__block_not_finite__has_scale_nan_alone(name, bad, rule):
    x = mixed(32)[:16].copy()
    clean_codes, clean_scales = MX(jnp.asarray(x), name, rule)
    x[3, 7] = bad

    codes, scales = MX(jnp.asarray(x), name, rule)

    others = np.arange(16) != 3
    assert np.asarray(scales)[3, 0] == 255
    assert np.isnan(MX_VALUES(codes, scales, name)[3]).all()
    np.testing.assert_array_equal(np.asarray(scales)[others], np.asarray(clean_scales)[others])
    np.testing.assert_array_equal(bits_of(codes)[others], bits_of(clean_codes)[others])


@pytest.mark.parametrize(("n", "axis"), [(31, -1), (70, 0)])
def test_quantize_mx__axis_not_a_multiple__is_padded_and_trimmed(n, axis):
    shape = [3, 3, 3]
    shape[axis] = n
    x = np.random.default_rng(n).standard_normal(shape).astype(np.float32)

    codes, scales = MX(jnp.asarray(x), "e4m3fn", axis=axis)

    width = [(0, 0)] * 3
    width[axis] = (0, -n % 32)
    rows = np.moveaxis(np.pad(x, width), axis, -1)
    expected_codes, expected_scales = MX(jnp.asarray(rows), "e4m3fn")
    expected_codes = np.moveaxis(np.asarray(expected_codes)[..., :n], -1, axis)
    np.testing.assert_array_equal(bits_of(codes), bits_of(np.ascontiguousarray(expected_codes)))
    np.testing.assert_array_equal(scales, np.moveaxis(np.asarray(expected_scales), -1, axis))
    values = np.asarray(MX_VALUES(codes, scales, "e4m3fn", axis=axis))
    assert np.abs(values - x).max() <= np.abs(x).max() / 16  # half a step of 3 bits


def test_quantize_mx__vmapped__quantizes_each_row():
    x = jnp.asarray(mixed(32)[:512].reshape(8, 64, 32))
    expected_codes, expected_scales = MX(x, "e2m1")

    codes, scales = jax.jit(jax.vmap(lambda row: quantize_mx(row, "e2m1")))(x)

    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)


def test_quantize_mx__stochastic__has_the_expectation_of_the_input():
    x = jnp.linspace(-5.9, 5.9, 32)

    @jax.jit
    @jax.vmap
    def draw(key):
        return dequantize_mx(*quantize_mx(x, "e2m1", rounding="stochastic", key=key), "e2m1")

    draws = draw(jax.random.split(jax.random.key(0), 4096))

    # Steps of at most 2: a standard deviation of at most 1 for a draw.
    np.testing.assert_allclose(draws.mean(0), x, atol=4 / np.sqrt(4096))
    assert np.unique(draws[:, 0]).tolist() == [-6, -4]


def test_quantize_mx__bf16__equals_its_f32_values():
    x = jnp.asarray(mixed(32)[:1024]).astype(jnp.bfloat16)

    codes, scales = MX(x, "e4m3fn")

    expected_codes, expected_scales = MX(jnp.asarray(oracles.f32(x)), "e4m3fn")
    np.testing.assert_array_equal(bits_of(codes), bits_of(expected_codes))
    np.testing.assert_array_equal(scales, expected_scales)


def test_quantize_mx__block_of_zero__is_refused():
    with pytest.raises(ValueError, match="block is 0; use 1 or more"):
        quantize_mx(jnp.zeros(32), "e4m3fn", block=0)


# Largest magnitude of a tensor of a million values; the last two are below the smallest scale.
TENSORS = {"any": 128, "wide": 0, "tiny": -90, "bottom": -112, "subnormal": -127}


def tensor(kind: str) -> np.ndarray:
    """f32 [n, 16], 2**20 finite values below 2**TENSORS[kind]."""
    if kind == "any":
        return mixed(16)
    rng = np.random.default_rng(5)
    top = TENSORS[kind]
    n = 2**16
    x = rng.uniform(-1, 1, (n, 16)) * np.exp2(rng.uniform(-22, 0, (n, 1)) + top)
    x[::7] = rng.integers(-24, 25, x[::7].shape) * 2.0 ** (top - 5 - rng.integers(0, 20, (1,)))
    x[::11], x[5::11] = 0, x[5::11, :1]
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", TENSORS)
def test_quantize_nvfp4__a_million_values__equals_torchao(kind):
    x = tensor(kind)

    codes, scales, whole = NVFP4(jnp.asarray(x), scale_min=TORCHAO_SCALE_MIN)

    if kind in ("any", "wide", "tiny"):
        assert float(whole) == np.abs(x).max() / np.float32(448 * 6)
    expected_scales, expected = oracles.torchao_nvfp4(x, float(whole))
    np.testing.assert_array_equal(bits_of(scales), expected_scales)
    np.testing.assert_array_equal(pack_4bit(codes), expected)


@pytest.mark.parametrize("kind", TENSORS)
def test_quantize_nvfp4__a_million_values__are_the_nearest_elements(kind):
    """With scales down to 2**-9; up to products that the roundings of the factor bring on a tie."""
    x = tensor(kind)

    codes, scales, whole = NVFP4(jnp.asarray(x))

    f = np.float32
    factor = (f(1) / f(whole)) / oracles.f32(scales)
    np.testing.assert_array_equal(
        codes, oracles.element_codes((x * factor).astype(np.float64), "e2m1")
    )


def test_quantize_nvfp4__values_around_ties__equal_torchao():
    """Where an error of one ulp in the factor of a block shows."""
    x = tensor("wide")[:4096]
    _, scales, whole = NVFP4(jnp.asarray(x), scale_min=TORCHAO_SCALE_MIN)
    unit = oracles.f32(scales) * np.float32(whole)
    middles = np.float32([0.25, 0.75, 1.25, 1.75, 2.5])
    ulps = np.random.default_rng(10).integers(-2, 3, (4096, 15)).astype(np.uint32)
    ties = np.tile(middles, 3) * unit
    top = np.abs(x).max(1, keepdims=True)
    x = np.concatenate([top, np.minimum((ties.view(np.uint32) + ulps).view(np.float32), top)], 1)

    codes, scales, whole = NVFP4(jnp.asarray(x), scale_min=TORCHAO_SCALE_MIN)

    expected_scales, expected = oracles.torchao_nvfp4(x, float(whole))
    np.testing.assert_array_equal(bits_of(scales), expected_scales)
    np.testing.assert_array_equal(pack_4bit(codes), expected)


def block_errors(x, codes, scales, whole):
    values = oracles.element_values(np.asarray(codes), "e2m1")
    return np.abs(values * oracles.f64(scales) * float(whole) - x).mean(1)


def test_quantize_nvfp4__small_tiles__lose_less_than_with_normal_scales():
    x = tensor("wide")

    codes, scales, whole = NVFP4(jnp.asarray(x))
    fine = block_errors(x, codes, scales, whole)
    torchao = block_errors(x, *NVFP4(jnp.asarray(x), scale_min=TORCHAO_SCALE_MIN))

    small = oracles.f32(scales)[:, 0] < TORCHAO_SCALE_MIN
    np.testing.assert_array_equal(fine[~small], torchao[~small])
    assert fine[small].mean() < 0.6 * torchao[small].mean()  # 0.525 measured


def four_over_six_oracle(x):
    """f64 [n, 2] mean absolute errors of both choices, all in NumPy."""
    f = np.float32
    amax = np.abs(x).max(1, keepdims=True)
    whole = np.maximum(amax.max() / f(256 * 6), f(2.0**-115))
    errors = []
    for element_max in (6, 4):
        scale = np.clip(amax / f(element_max) / whole, f(2.0**-9), f(448))
        scale = oracles.f64(oracles.plain_cast(scale, "float8_e4m3fn"))
        values = oracles.element_values(oracles.element_codes(x / (scale * whole), "e2m1"), "e2m1")
        errors.append(np.abs(values * scale * whole - x).mean(1))
    return np.stack(errors, 1)


def test_quantize_nvfp4__four_over_six__takes_the_better_choice_of_each_block():
    x = np.random.default_rng(6).standard_normal((4096, 16)).astype(np.float32)
    x *= np.exp2(np.random.default_rng(7).uniform(-6, 0, (4096, 1))).astype(np.float32)

    errors = block_errors(x, *NVFP4(jnp.asarray(x), four_over_six=True))

    both = four_over_six_oracle(x)
    np.testing.assert_allclose(errors, both.min(1), rtol=1e-5)
    assert (errors <= both[:, 0] * (1 + 1e-5)).all()  # of plain NVFP4 under the same global scale
    fours = np.mean(both[:, 1] < both[:, 0])
    assert 0.2 < fours < 0.8  # both choices are taken
    plain = block_errors(x, *NVFP4(jnp.asarray(x)))
    assert errors.mean() < 0.95 * plain.mean()


def test_quantize_nvfp4__four_over_six__equal_errors_take_six():
    x = np.tile(np.float32([6, 3, 1.5, 0]), 4)[None].repeat(2, 0)  # both maps are exact
    x[1] = 0

    codes, scales, _ = NVFP4(jnp.asarray(x), four_over_six=True)

    np.testing.assert_array_equal(codes[0], np.tile([7, 5, 3, 0], 4))
    assert oracles.f32(scales).ravel().tolist() == [256, 2.0**-9]


@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_quantize_nvfp4__block_not_finite__has_scale_nan_alone(bad, four_over_six):
    x = np.random.default_rng(8).standard_normal((16, 16)).astype(np.float32)
    bad_x = x.copy()
    bad_x[3, 7] = bad
    x[3] = 0  # the amax of the others

    codes, scales, whole = NVFP4(jnp.asarray(bad_x), four_over_six=four_over_six)

    expected = NVFP4(jnp.asarray(x), four_over_six=four_over_six)
    values, clean = (np.array(NVFP4_VALUES(*q)) for q in ((codes, scales, whole), expected))
    assert np.isnan(oracles.f32(scales)[3]).all()
    assert np.isnan(values[3]).all()
    np.testing.assert_array_equal(np.delete(values, 3, 0), np.delete(clean, 3, 0))


@pytest.mark.parametrize(("n", "axis"), [(15, -1), (35, 0)])
def test_quantize_nvfp4__axis_not_a_multiple__is_padded_and_trimmed(n, axis):
    shape = [3, 3, 3]
    shape[axis] = n
    x = np.random.default_rng(n).standard_normal(shape).astype(np.float32)

    codes, scales, whole = NVFP4(jnp.asarray(x), axis=axis)

    width = [(0, 0)] * 3
    width[axis] = (0, -n % 16)
    rows = np.moveaxis(np.pad(x, width), axis, -1)
    expected_codes, expected_scales, expected_whole = NVFP4(jnp.asarray(rows))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(codes), axis, -1), expected_codes[..., :n])
    np.testing.assert_array_equal(
        oracles.f32(np.moveaxis(np.asarray(scales), axis, -1)), oracles.f32(expected_scales)
    )
    assert whole == expected_whole
    values = np.asarray(NVFP4_VALUES(codes, scales, whole, axis=axis))
    assert np.abs(values - x).max() <= 1.1 * np.abs(x).max() / 6  # half of the step from 4 to 6
