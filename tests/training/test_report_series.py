"""Long series made short: against brute force, and what must survive."""

import numpy as np
import pytest

from lowprec_jax.training.report_data import Reports, Series
from lowprec_jax.training.report_series import smooth, thin, time_columns, window_of


def series(values) -> Series:
    return Series(np.arange(1, len(values) + 1), np.asarray(values, float))


def test_thin__a_long_series__keeps_every_spike_and_little_else():
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345], values[40_001] = 99.0, -99.0
    short = thin(series(values))
    assert len(short.steps) <= 1600
    assert (short.steps[short.values.argmax()], short.steps[short.values.argmin()]) == (
        12346,
        40002,
    )
    assert (np.diff(short.steps) > 0).all()
    np.testing.assert_array_equal(short.values, values[short.steps - 1])


def test_thin__a_stretch_without_numbers__stays_a_gap():
    values = np.ones(10_000)
    values[4000:6000] = np.nan
    short = thin(series(values), points=100)
    gap = (short.steps > 4000) & (short.steps <= 6000)
    assert (gap.sum(), (~gap).sum()) == (10, 40)  # 50 stretches of 200 equal numbers
    assert np.isnan(short.values[gap]).all()
    assert np.isfinite(short.values[~gap]).all()


@pytest.mark.parametrize(("count", "points"), [(1, 10), (40, 100), (700, 900), (5000, 60)])
def test_smooth__against_brute_force__is_the_median_around_each_step(count, points):
    values = np.random.default_rng(count).normal(size=count)
    values[count // 3 : count // 3 + 3] = np.nan
    half = window_of(count) // 2
    short = smooth(series(values), points)
    assert len(short.steps) == min(count, points)
    for number, value in zip(short.steps, short.values, strict=True):
        at = number - 1
        known = np.isfinite(values[at])
        expected = np.nanmedian(values[max(at - half, 0) : at + half + 1]) if known else np.nan
        np.testing.assert_array_equal(value, expected)


def test_time_columns__many_reports__keep_the_worst():
    values = np.random.default_rng(0).random((3000, 5, 2), np.float32)
    values[1234, 3, 1] = 7
    columns = time_columns(Reports(list("abcde"), np.arange(25, 75_001, 25), values))
    assert columns.highest.shape[0] <= 161
    assert len(columns.edges) == columns.highest.shape[0] + 1
    assert (np.diff(columns.edges) > 0).all()
    where = np.searchsorted(columns.edges, 1235 * 25) - 1
    assert columns.highest[where, 3, 1] == 7
    np.testing.assert_array_equal(columns.highest.max(0), values.max(0))
    np.testing.assert_array_equal(columns.lowest.min(0), values.min(0))


def test_time_columns__a_phase_without_reports__is_a_column_without_numbers():
    steps = np.array([10, 20, 30, 100, 110])
    columns = time_columns(Reports(["a"], steps, np.ones((5, 1, 1), np.float32)))
    assert columns.edges.tolist() == [0, 10, 20, 30, 90, 100, 110]
    np.testing.assert_array_equal(columns.highest[:, 0, 0], [1, 1, 1, np.nan, 1, 1])


def test_time_columns__one_report__speaks_for_the_steps_before_it():
    columns = time_columns(Reports(["a"], np.array([25]), np.ones((1, 1, 1), np.float32)))
    assert columns.edges.tolist() == [0, 25]
