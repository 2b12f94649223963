"""Meshes by name."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from lowprec_jax.errors import UserError
from lowprec_jax.sharding import batch_size_of, make_mesh


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_make_mesh__sizes__are_of_three_axes_over_the_first_devices(sizes):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]
    assert batch_size_of(mesh) == sizes[0] * sizes[1]


def test_make_mesh__explicit__leaves_tensor_automatic():
    kinds = make_mesh(2, 2, 2, explicit=True).axis_types
    assert kinds == (AxisType.Explicit, AxisType.Explicit, AxisType.Auto)
    assert set(make_mesh(2, 2, 2).axis_types) == {AxisType.Auto}


def test_make_mesh__more_than_there_are__is_refused():
    with pytest.raises(UserError, match=r"mesh.data 3 x mesh.fsdp 2 x .* = 12 devices, but .* 8 "):
        make_mesh(3, 2, 2)
    assert jnp.ones(()).devices()  # the backend is as it was


def test_make_mesh__several_processes__must_use_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"= 4 devices, but 2 processes have 8.*to make 8"):
        make_mesh(2, 2)
