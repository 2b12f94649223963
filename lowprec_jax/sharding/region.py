"""What a function says inside the region of a `Layout`, where it has the part of one device."""

from typing import Any

import jax
from jax import lax

from lowprec_jax import compat
from lowprec_jax.sharding.mesh import BATCH_AXES

Tree = Any


def device_axes() -> tuple[str, ...]:
    """The axes over which devices share a batch and sum by themselves; empty outside a region."""
    manual = compat.manual_axes()
    return tuple(axis for axis in BATCH_AXES if axis in manual)


def local_copy(tree: Tree) -> Tree:
    """Marks replicated values as local, so that their gradients stay local until they are summed.

    Without it every layer would sum its own.
    """
    axes = device_axes()
    return jax.tree.map(lambda x: compat.to_varying(x, axes), tree)


def sum_over_devices(tree: Tree) -> Tree:
    """Sums a tree over the devices that share a batch; XLA makes it one all-reduce."""
    axes = device_axes()
    return lax.psum(tree, axes) if axes else tree
