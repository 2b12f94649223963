"""Device meshes, sharding rules, and how a step is spread over devices."""

from lowprec_jax.sharding.gradient_reduction import fp8_all_reduce, init_reduction
from lowprec_jax.sharding.layout import Layout, Strategy
from lowprec_jax.sharding.mesh import (
    BATCH_AXES,
    DATA_AXIS,
    FSDP_AXIS,
    TENSOR_AXIS,
    batch_size_of,
    make_mesh,
)
from lowprec_jax.sharding.region import device_axes, local_copy, sum_over_devices
from lowprec_jax.sharding.rules import ShardingRule, dimension_over, partition_specs

__all__ = [
    "BATCH_AXES",
    "DATA_AXIS",
    "FSDP_AXIS",
    "TENSOR_AXIS",
    "Layout",
    "ShardingRule",
    "Strategy",
    "batch_size_of",
    "device_axes",
    "dimension_over",
    "fp8_all_reduce",
    "init_reduction",
    "local_copy",
    "make_mesh",
    "partition_specs",
    "sum_over_devices",
]
