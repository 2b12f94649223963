"""Device meshes by name."""

import math

import jax
from jax.sharding import AxisType, Mesh

from lowprec_jax.errors import UserError

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"
TENSOR_AXIS = "tensor"
# The axes over which a batch is split.
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, explicit: bool = False) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``, of sizes that may be 1.

    Neighbouring devices, which have the quickest links, share a tensor axis.

    Args:
      data: devices, each with all parameters, that share a batch.
      fsdp: devices that share a batch *and* the parameters.
      tensor: devices that share each matmul.
      explicit: make data and fsdp explicit axes (shardings are part of array types); tensor stays
        automatic.

    Raises:
      UserError: there are not that many devices, or several processes would leave some idle.
    """
    devices, needed = jax.devices(), data * fsdp * tensor
    asked = f"mesh.data {data} x mesh.fsdp {fsdp} x mesh.tensor {tensor} = {needed} devices"
    if needed > len(devices):
        raise UserError(
            f"{asked}, but there are {len(devices)} ({devices[0].platform}). Use a mesh of "
            f"{len(devices)} or less; on a CPU, XLA_FLAGS="
            f"--xla_force_host_platform_device_count={needed} emulates {needed} devices."
        )
    if jax.process_count() > 1 and needed < len(devices):
        raise UserError(
            f"{asked}, but {jax.process_count()} processes have {len(devices)}. With several "
            f"processes the mesh must use all devices: set mesh.data or mesh.fsdp to make "
            f"{len(devices)}."
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        (data, fsdp, tensor),
        (DATA_AXIS, FSDP_AXIS, TENSOR_AXIS),
        axis_types=(kind, kind, AxisType.Auto),
        devices=devices[:needed],
    )


def batch_size_of(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
