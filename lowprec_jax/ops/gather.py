"""A kernel that is sharded over mesh axes, brought together for a matmul, and its gradient back.

What travels is what the matmul multiplies: codes of one byte, quantized on the shard, where bf16
parameters would be two. They travel as uint8, since XLA:CPU widens f8 collectives.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat


@dataclasses.dataclass(frozen=True)
class Gather:
    """How a kernel is sharded, as fully sharded data parallelism (FSDP, ZeRO-3) does it.

    Inside `jax.shard_map` over `axes` the op is given the local shard: it gathers the codes of all
    shards, in the backward pass once more (only the local codes are kept), and reduce-scatters the
    gradient. Under plain ``jit`` the kernel is whole and the same is asked of the compiler.

    Attributes:
      axes: mesh axes over which the kernel is sharded.
      axis: the axis of the kernel that is split.
      reduce_dtype: type in which gradients are summed over the devices.

    Source: Rajbhandari et al., ZeRO, arXiv:1910.02054, section 5.3; the gather of FP8 codes,
      pytorch/torchtitan, docs/float8.md.
    Differs from: torchtitan, whose scales take an all-reduce before each step; those of delayed
      scaling are known.
    """

    axes: tuple[str, ...]
    axis: int
    reduce_dtype: Any = jnp.float32

    @property
    def is_manual(self) -> bool:
        """Whether this runs inside a `jax.shard_map` over the axes."""
        return set(self.axes) <= set(compat.manual_axes())


def all_gather(x: jax.Array, how: Gather | None) -> jax.Array:
    """The whole array; for what is not differentiated; see `gather`."""
    if how is None:
        return x
    if how.is_manual:
        return lax.all_gather(x, how.axes, axis=how.axis, tiled=True)
    return compat.unshard(x, how.axis)


def reduce_scatter(grad: jax.Array, how: Gather | None) -> jax.Array:
    """Sums the gradient of the whole array over the devices; each gets the part of its shard.

    Under plain ``jit`` the sum is the compiler's and nothing is done here.
    """
    if how is None or not how.is_manual:
        return grad
    summed = lax.psum_scatter(
        grad.astype(how.reduce_dtype), how.axes, scatter_dimension=how.axis, tiled=True
    )
    return summed.astype(grad.dtype)


def gather(x: jax.Array, how: Gather) -> jax.Array:
    """The whole of a sharded array in its own precision; its gradient is reduce-scattered.

    For parameters that no quantized matmul reads: embeddings, layers in high precision.
    """
    return _gather_shards(x, how) if how.is_manual else all_gather(x, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_shards(x, how):
    return all_gather(x, how)


_gather_shards.defvjp(
    lambda x, how: (all_gather(x, how), None),
    lambda how, _, grad: (reduce_scatter(grad, how),),
)
