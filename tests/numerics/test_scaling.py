"""amax and scale: bit for bit with NumPy for every exponent, finite and positive always."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lowprec_jax import numerics
from lowprec_jax.numerics import (
    compute_amax,
    reciprocal,
    round_up_to_power_of_two,
    scale_from_amax,
    usable,
)

FORMATS = numerics.formats()
MODES = {
    "eager": scale_from_amax,
    "jit": jax.jit(scale_from_amax, static_argnums=1, static_argnames="margin"),
}


def _amaxes():
    """Every f32 exponent with five mantissas, both infinities, NaN, and some random numbers."""
    mantissas = np.array([0, 1, 0x400000, 0x7FFFFE, 0x7FFFFF], np.uint32)
    bits = (np.arange(256, dtype=np.uint32)[:, None] << 23) | mantissas
    random = np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float32)
    named = np.float32([0, 1e-40, 1e-38, 3e38, np.inf, np.nan])
    return np.concatenate([bits.ravel().view(np.float32), named, random])


@pytest.mark.parametrize("margin", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scale_from_amax__every_exponent__equals_numpy_bitwise(fmt, mode, margin):
    amax = _amaxes()

    scale = MODES[mode](jnp.asarray(amax), fmt, margin=margin, fallback=0.5)

    limits = oracles.PUBLISHED_LIMITS[fmt.name]
    # An amax is mapped onto half a step above the largest integer.
    target = limits.max + limits.min_subnormal / 2 * ("int" in fmt.name)
    expected = oracles.scale_from_amax(amax, target, margin, fallback=0.5)
    oracles.assert_same_bits(scale, expected)


@pytest.mark.parametrize("margin", [0, 40, 100])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scale_from_amax__every_exponent__it_and_its_reciprocal_are_normal(fmt, margin):
    scale = scale_from_amax(jnp.asarray(_amaxes()), fmt, margin=margin)

    for factor in (np.asarray(scale), np.asarray(reciprocal(scale))):
        assert np.all(np.isfinite(factor))
        assert np.all(factor >= 2.0**-126)


@pytest.mark.parametrize(
    "amax", [0.0, 1e-40, np.nextafter(np.float32(2**-126), np.float32(0)), np.inf, np.nan]
)
def test_scale_from_amax__no_usable_amax__gives_the_fallback(amax):
    amax = jnp.float32(amax)

    assert scale_from_amax(amax, numerics.E4M3FN) == 1.0
    assert scale_from_amax(amax, numerics.E4M3FN, fallback=jnp.float32(0.25)) == 0.25
    assert not usable(amax)


def test_scale_from_amax__fallback_of_the_same_shape__replaces_only_the_unusable():
    amax = jnp.array([448.0, 0.0, jnp.nan, 896.0], jnp.float32)
    previous = jnp.array([10.0, 20.0, 30.0, 40.0], jnp.float32)

    scale = scale_from_amax(amax, numerics.E4M3FN, fallback=previous)

    np.testing.assert_array_equal(scale, [1.0, 20.0, 30.0, 2.0])


@pytest.mark.parametrize("amax", [2.0**-126, 1e-30, 1.0, 3e38, 3.4028235e38])
def test_usable__normal_finite_amax__is_true(amax):
    assert usable(jnp.float32(amax))


@pytest.mark.parametrize("margin", [1, 2, 7])
@pytest.mark.parametrize("fmt", [numerics.E4M3FN, numerics.E5M2, numerics.E3M4], ids=str)
def test_scale_from_amax__margin__multiplies_by_its_power_of_two(fmt, margin):
    amax = jnp.asarray(np.geomspace(1e-20, 1e20, 50).astype(np.float32))

    wider, plain = scale_from_amax(amax, fmt, margin=margin), scale_from_amax(amax, fmt)

    np.testing.assert_array_equal(wider, np.asarray(plain) * np.float32(2.0**margin))


def test_scale_from_amax__scalar__is_rank_0_f32():
    scale = scale_from_amax(jnp.float32(896.0), numerics.E4M3FN)

    assert (scale.shape, scale.dtype, float(scale)) == ((), jnp.float32, 2.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_compute_amax__random__equals_numpy_in_f32(dtype):
    x = (jax.random.normal(jax.random.key(0), (16, 24, 5)) - 0.5).astype(dtype)

    amax = jax.jit(compute_amax)(x)

    assert (amax.shape, amax.dtype) == ((), jnp.float32)
    assert amax == np.max(np.abs(oracles.f32(x)))


@pytest.mark.parametrize("mode", [compute_amax, jax.jit(compute_amax)], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([0.0, -0.0], 0.0),
        ([1.0, -3.0], 3.0),
        ([1.0, np.nan, 9.0], np.nan),
        ([-np.inf, 1.0], np.inf),
        ([np.inf, np.nan], np.nan),
    ],
)
def test_compute_amax__special_values__are_reported(values, expected, dtype, mode):
    np.testing.assert_array_equal(mode(jnp.array(values, dtype)), np.float32(expected))


@pytest.mark.parametrize("shape", [(4096,), (64, 96), (4, 33, 128)])
@pytest.mark.parametrize("special", [np.nan, -np.inf])
def test_compute_amax__special_value_anywhere__is_reported(special, shape):
    """XLA:CPU's float maximum loses NaN in vectorized reductions, and all elements before it."""
    amax = jax.jit(compute_amax)
    for position in (0, 1, 7, 500, 4095):
        x = np.ones(shape, np.float32)
        x.flat[position] = special

        np.testing.assert_array_equal(amax(jnp.asarray(x)), np.abs(np.float32(special)))


def test_compute_amax__sharded_input__is_the_maximum_of_all_shards():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "model")))

    amax = jax.block_until_ready(jax.jit(compute_amax)(sharded))

    assert amax == np.abs(x).max()


@pytest.mark.parametrize("mode", [reciprocal, jax.jit(reciprocal)], ids=["eager", "jit"])
def test_reciprocal__of_every_possible_scale__equals_numpy_bitwise(mode):
    scale = oracles.scale_from_amax(_amaxes(), 448.0)

    oracles.assert_same_bits(mode(jnp.asarray(scale)), np.float32(1) / scale)


def test_round_up_to_power_of_two__any_scale__is_the_smallest_power_not_below():
    rng = np.random.default_rng(0)
    exponents = np.arange(-126, 127)
    scales = np.concatenate(
        [
            np.ldexp(np.float32(1), exponents),
            np.ldexp(rng.uniform(1, 2, 20_000), rng.integers(-126, 126, 20_000)),
            np.nextafter(np.ldexp(np.float32(1), exponents[:-1]), np.float32(np.inf)),
            np.nextafter(np.ldexp(np.float32(1), exponents[1:]), np.float32(0)),
        ]
    ).astype(np.float32)
    mantissa, exponent = np.frexp(scales.astype(np.float64))
    expected = np.ldexp(1.0, exponent - (mantissa == 0.5)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(round_up_to_power_of_two)(scales), expected)
