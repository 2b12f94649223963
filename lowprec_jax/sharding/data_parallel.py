"""Data parallelism: every device holds the model and works on its part of the batch.

Under `jax.shard_map` the communication of a step is what is written here: one sum of gradients and
counts, and one maximum of all the amaxes of the model (in `lowprec_jax.state.collect`). Plain
``jit`` would put small all-reduces into every layer.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax import compat
from lowprec_jax.sharding.mesh import DATA_AXIS


def over_data(step: Callable, mesh: Mesh) -> Callable:
    """Wraps ``step(state, batch) -> outputs`` so that each device sees its part of the batch.

    Args:
      step: its outputs must be equal on all devices; use `sum_over_data` on what is not.
      mesh: from `make_mesh`. With one device the step is returned as it is.
    """
    if mesh.size == 1:
        return step
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P())


def local_copy(tree: Any) -> Any:
    """Marks replicated values as local, so that their gradients stay local until they are summed.

    Without it every layer would sum its own.
    """
    axes = compat.manual_axes()
    return jax.tree.map(lambda x: compat.to_varying(x, axes), tree)


def sum_over_data(tree: Any) -> Any:
    """Sums a tree over the devices of the enclosing `over_data`; XLA makes it one all-reduce."""
    axes = compat.manual_axes()
    return jax.lax.psum(tree, axes) if axes else tree


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the mesh, split along its first axis."""
    return jax.device_put(batch, NamedSharding(mesh, P(DATA_AXIS)))


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))
