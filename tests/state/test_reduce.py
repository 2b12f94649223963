"""Amaxes of several devices: the largest, and a NaN on one of them is not lost."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lowprec_jax.ops.operands import largest_amax
from lowprec_jax.recipes import FP8_DELAYED, Record, init_state
from lowprec_jax.state import advance, sites
from lowprec_jax.state.sites import add_observations


def on_devices(f, x: np.ndarray):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P()))(x)


@pytest.mark.parametrize("device", range(8))
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_largest_amax__not_finite_on_one_device__is_not_finite_on_all(device, bad):
    values = np.arange(8, dtype=np.float32)
    values[device] = bad
    found = on_devices(lambda x: largest_amax(x, ("data",)), values)
    assert not np.isfinite(np.asarray(found)).any()


def test_largest_amax__finite__is_the_largest():
    found = on_devices(lambda x: largest_amax(x, ("data",)), np.arange(8, dtype=np.float32))
    assert float(found[0]) == 7.0


def test_add_observations__nan_on_one_device__is_dropped_everywhere():
    seen = np.ones((8, 3, 5), np.float32)
    seen[5, 1, 0] = np.nan
    state = {"site": init_state(FP8_DELAYED)}

    def step(seen):
        return advance(add_observations(state, [seen[0]]))

    [(_, after)] = sites(on_devices(step, seen))
    np.testing.assert_array_equal(after["observed"][:, Record.DROPPED], [0, 1, 0])
    np.testing.assert_array_equal(after["amax_history"][:, 0], [1, 0, 1])
