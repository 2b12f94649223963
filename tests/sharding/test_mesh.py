import jax
import jax.numpy as jnp
import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.sharding import DATA_AXIS, make_mesh


@pytest.mark.parametrize("devices", [1, 8])
def test_make_mesh__has_one_axis__over_the_first_devices(devices):
    mesh = make_mesh(devices)
    assert dict(mesh.shape) == {DATA_AXIS: devices}
    assert list(mesh.devices) == jax.devices()[:devices]


def test_make_mesh__more_than_there_are__is_refused():
    devices = jax.device_count()
    with pytest.raises(UserError, match=f"mesh.data {devices + 1} needs .* there are {devices} "):
        make_mesh(devices + 1)
    assert jnp.ones(()).devices()  # the backend is as it was
