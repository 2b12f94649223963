"""Random numbers of stochastic rounding: uniform, independent along the array and between keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax.numerics.uniform import uniform

SHAPE = (512, 2048)


@pytest.fixture(scope="module")
def draws():
    """Of eight keys that follow each other, as those of eight steps."""
    draw = jax.jit(lambda seed: uniform(jax.random.fold_in(jax.random.key(0), seed), SHAPE))
    return [np.asarray(draw(seed), np.float64) for seed in range(8)]


def test_uniform__cells_of_the_interval__are_hit_equally(draws):
    for draw in draws:
        assert draw.min() >= 0
        assert draw.max() < 1
        cells = 1024
        expected = draw.size / cells
        chi2 = ((np.histogram(draw, cells, (0, 1))[0] - expected) ** 2 / expected).sum()
        assert abs(chi2 - (cells - 1)) < 5 * np.sqrt(2 * cells)


def test_uniform__low_bits__are_random_too(draws):
    for draw in draws:
        ones = ((draw * 2**24).astype(np.int64)[..., None] >> np.arange(24) & 1).mean((0, 1))
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(draw.size)


@pytest.mark.parametrize("lag", [1, 2, 16, 32, 2048])
def test_uniform__neighbours__are_not_correlated(draws, lag):
    for draw in draws:
        flat = draw.ravel()
        found = np.corrcoef(flat[:-lag], flat[lag:])[0, 1]
        assert abs(found) < 5 / np.sqrt(flat.size)


def test_uniform__keys_of_other_steps__are_not_correlated(draws):
    found = np.corrcoef([draw.ravel() for draw in draws]) - np.eye(len(draws))
    assert np.abs(found).max() < 5 / np.sqrt(draws[0].size)


def test_uniform__array_split_by_the_compiler__has_the_numbers_of_the_whole(draws):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P("data"))
    x = jax.device_put(jnp.zeros(SHAPE), sharding)
    key = jax.random.fold_in(jax.random.key(0), 3)
    split = jax.jit(lambda x: x + uniform(key, SHAPE), out_shardings=sharding)(x)
    np.testing.assert_array_equal(split, draws[3].astype(np.float32))
