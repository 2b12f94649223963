"""Device meshes and how a step is spread over them."""

from lowprec_jax.sharding.data_parallel import (
    local_copy,
    over_data,
    put_batch,
    put_replicated,
    sum_over_data,
)
from lowprec_jax.sharding.mesh import DATA_AXIS, make_mesh

__all__ = [
    "DATA_AXIS",
    "local_copy",
    "make_mesh",
    "over_data",
    "put_batch",
    "put_replicated",
    "sum_over_data",
]
