"""Device meshes by name."""

import jax
from jax.sharding import AxisType, Mesh

from lowprec_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(data: int = 1) -> Mesh:
    """A mesh of the first `data` devices along one axis, over which a batch is split.

    Raises:
      UserError: there are not that many devices.
    """
    devices = jax.devices()
    if data > len(devices):
        raise UserError(
            f"mesh.data {data} needs {data} devices; there are {len(devices)} "
            f"({devices[0].platform}). Use mesh.data {len(devices)} or less; on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={data} emulates {data} devices."
        )
    return jax.make_mesh((data,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:data])
