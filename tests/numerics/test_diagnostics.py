"""Counts and SQNR: against NumPy, and under jit, vmap and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax import numerics
from lowprec_jax.numerics import (
    E4M3FN,
    E5M2,
    range_statistics,
    saturated_fraction,
    sqnr_db,
    underflow_fraction,
)

HELD = [f for f in numerics.formats() if f.dtype == oracles.ML_DTYPES.get(f.name)]
NARROW = [f for f in HELD if f.element and f.bits == 8]
ELEMENTS = [f for f in HELD if f.element]
COMPILED = jax.jit(range_statistics, static_argnums=2)


def _with_specials(seed, shape=(64, 96)):
    """Sixty binades, with some exact zeros, NaN and infinities; no f32 subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.uniform(-30, 30, shape)
    x[rng.random(shape) < 0.1] = 0
    for value in (np.nan, np.inf, -np.inf):
        x[rng.random(shape) < 0.01] = value
    return x.astype(np.float32)


def _assert_counts(statistics, expected):
    for name in expected._fields:
        actual = getattr(statistics, name)
        assert (actual.shape, actual.dtype) == ((), jnp.float32), name
        np.testing.assert_array_equal(actual, np.float32(getattr(expected, name)), err_msg=name)


@pytest.mark.parametrize("mode", [range_statistics, COMPILED], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_range_statistics__random_with_specials__counts_what_a_bare_cast_loses(fmt, dtype, mode):
    x = jnp.asarray(_with_specials(0)).astype(dtype)

    statistics = mode(x, jnp.float32(0.37), fmt)

    expected = oracles.range_counts(x, 0.37, fmt.dtype)
    assert min(expected[1:]) > 10
    _assert_counts(statistics, expected)


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_range_statistics__finite_input__has_a_finite_amax(fmt):
    x = _with_specials(1)
    x = np.where(np.isfinite(x), x, 0)

    statistics = COMPILED(jnp.asarray(x), jnp.float32(2.0), fmt)

    _assert_counts(statistics, oracles.range_counts(x, 2.0, fmt.dtype))
    assert statistics.amax == np.abs(x).max()


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_range_statistics__around_the_overflow_tie__counts_what_rounds_beyond(fmt):
    """A tie goes to the even mantissa: 61440 overflows e5m2, 464 does not overflow e4m3fn."""
    bound = np.float32(fmt.overflow_bound)
    with np.errstate(over="ignore"):
        above = np.nextafter(bound, np.float32(np.inf))
    x = np.float32([fmt.max, bound, above, -bound, -above, np.inf, np.nan])

    statistics = COMPILED(jnp.asarray(x), jnp.float32(1), fmt)

    _assert_counts(statistics, oracles.range_counts(x, 1, fmt.dtype))
    assert statistics.saturated == 3


def test_range_statistics__crafted__counts_are_these():
    x = jnp.array([0.0, -0.0, 464.0, 464.1, -1e9, jnp.inf, -jnp.inf, jnp.nan, 2**-10, -(2.0**-9)])

    amax, saturated, underflow, nonfinite = range_statistics(x, jnp.float32(1), E4M3FN)

    assert jnp.isnan(amax)
    assert (saturated, underflow, nonfinite) == (4, 1, 3)


@pytest.mark.parametrize("position", [0, 1, 500, 4095])
def test_range_statistics__nan_anywhere__is_the_amax_and_is_counted(position):
    """XLA:CPU's float maximum loses NaN in vectorized reductions."""
    x = np.ones(4096, np.float32)
    x[position] = np.nan

    _assert_counts(
        COMPILED(jnp.asarray(x), jnp.float32(1), E4M3FN), (oracles.RangeCounts(np.nan, 0, 0, 1))
    )


def test_range_statistics__scale_per_row__is_broadcast():
    x = _with_specials(2, (16, 40))
    scale = np.geomspace(1e-4, 1e4, 16, dtype=np.float32)[:, None]

    statistics = COMPILED(jnp.asarray(x), jnp.asarray(scale), E4M3FN)

    _assert_counts(statistics, oracles.range_counts(x, scale, E4M3FN.dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 5, 4)])
def test_range_statistics__any_rank__counts(shape):
    x = np.full(shape, 1000.0, np.float32)

    statistics = COMPILED(jnp.asarray(x), jnp.float32(1), E4M3FN)

    _assert_counts(statistics, oracles.range_counts(x, 1, E4M3FN.dtype))


def test_range_statistics__under_vmap__equals_a_loop():
    x = _with_specials(3, (5, 32, 24))
    scale = np.geomspace(0.01, 100, 5, dtype=np.float32)
    counting = jax.jit(jax.vmap(lambda a, s: range_statistics(a, s, E5M2)))

    statistics = counting(jnp.asarray(x), jnp.asarray(scale))

    for i in range(5):
        expected = oracles.range_counts(x[i], scale[i], E5M2.dtype)
        _assert_counts(jax.tree.map(lambda a, i=i: a[i], statistics), expected)


def test_range_statistics__in_shard_map__shards_add_up_to_the_whole():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",))
    x = _with_specials(4, (64, 48))
    x = np.where(np.isnan(x), 0, x)

    def body(shard):
        local = range_statistics(shard, jnp.float32(0.37), E4M3FN)
        total = jax.tree.map(lambda a: jax.lax.psum(a, "data"), local)
        return total._replace(amax=jax.lax.pmax(local.amax, "data"))

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=True)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    statistics = jax.block_until_ready(jax.jit(mapped)(sharded))

    _assert_counts(statistics, oracles.range_counts(x, 0.37, E4M3FN.dtype))


def test_fractions__crafted__divide_by_all_elements():
    x = jnp.array([1e6, -1e6, 1e-6, 0.0, 1.0, jnp.nan, jnp.inf, 2.0], jnp.float32)

    assert saturated_fraction(x, jnp.float32(1), E4M3FN) == 3 / 8
    assert underflow_fraction(x, jnp.float32(1), E4M3FN) == 1 / 8


def test_fractions__empty__are_zero():
    empty = jnp.zeros((0, 4), jnp.float32)

    assert saturated_fraction(empty, jnp.float32(1), E5M2) == 0
    assert underflow_fraction(empty, jnp.float32(1), E5M2) == 0


def test_underflow_fraction__log_uniform__is_that_of_other_libraries():
    exponents = np.random.default_rng(5).uniform(-24, 0, 2**18)
    x = jnp.asarray((2.0**exponents).astype(np.float32))

    fractions = {
        fmt.name: float(underflow_fraction(x, numerics.quantize(x, fmt).scale, fmt))
        for fmt in (E4M3FN, E5M2)
    }

    # Derived: e4m3fn reaches from 448 down to 2**-10, 18.81 of 24 binades; e5m2 32.8, all of them.
    # 2**18 draws: standard error 0.0008.
    assert fractions["e4m3fn"] == pytest.approx(1 - (np.log2(448) + 10) / 24, abs=0.0032)
    assert fractions["e5m2"] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sqnr_db__random__equals_float64(dtype):
    keys = jax.random.split(jax.random.key(6))
    reference = jax.random.normal(keys[0], (32, 48)).astype(dtype)
    noise = (0.01 * jax.random.normal(keys[1], (32, 48))).astype(dtype)
    approximation = reference + noise

    expected = oracles.sqnr_db(oracles.f32(reference), oracles.f32(approximation))

    # f32 sums of 1536 squares: 1536 * 2**-24 of each norm at the very most, 0.002 dB.
    assert float(sqnr_db(reference, approximation)) == pytest.approx(expected, abs=2e-3)


def test_sqnr_db__known_ratio__is_20_log10_of_it():
    reference = jnp.full((4, 4), 100.0)

    assert float(sqnr_db(reference, reference + 1.0)) == pytest.approx(40.0, abs=1e-4)


def test_sqnr_db__equal_arrays__is_infinite():
    assert sqnr_db(jnp.ones(5), jnp.ones(5)) == jnp.inf
