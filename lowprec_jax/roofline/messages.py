"""What one chip of a mesh sends in a training step of the reference transformer.

Public name: `messages_of`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lowprec_jax.ops import Gather
from lowprec_jax.ops.dimensions import Dimensions
from lowprec_jax.ops.operands import can_gather_codes
from lowprec_jax.recipes import Column, Recipe, Role, assign
from lowprec_jax.roofline.communication import (
    REDUCE_BYTES,
    Message,
    gradient_messages,
    kernel_messages,
)
from lowprec_jax.roofline.layer import HIGH_BYTES
from lowprec_jax.roofline.transformer import Kernel, Run, by_path, kernels_of, split_dimension
from lowprec_jax.sharding import FSDP_AXIS

__all__ = ["messages_of"]

Tree = Any


def messages_of(run: Run, params: Tree) -> list[Message]:
    """Everything that one chip sends in a step.

    Args:
      run: what is planned.
      params: abstract parameters with their shardings.
    """
    kernels, named = kernels_of(run, params), by_path(params)
    recipes = {a.path: a.recipe for a in assign(kernels, run.rules)}
    messages, reduce = [], REDUCE_BYTES[run.reduce]
    shards = whole = 0
    for name, x in named.items():
        part = math.prod(x.sharding.shard_shape(x.shape))  # pyright: ignore[reportOptionalMemberAccess]
        if run.mesh.fsdp > 1 and split_dimension(x, FSDP_AXIS) is None:
            whole += part
            continue
        shards += part
        if run.mesh.fsdp > 1:
            path = name.removesuffix("/kernel")
            size, calls, each = part * run.mesh.fsdp, 1, (x.dtype.itemsize,)  # the embedding
            if path in kernels:
                calls = kernels[path].layers
                size, each = size // calls, _gather_bytes(run, path, kernels[path], recipes[path])
            calls *= run.micro_batches
            messages += kernel_messages(name, size, each, calls, run.mesh, reduce)
    width = jnp.dtype(run.sizes.param_dtype).itemsize
    messages += gradient_messages(shards, whole, run.mesh, reduce, run.zero1, width)
    return [
        *messages,
        *_amax_messages(run, kernels, recipes),
        _tensor_message(run, kernels),
    ]


def _gather_bytes(run: Run, path: str, kernel: Kernel, recipe: Recipe) -> tuple[float, ...]:
    """Bytes of an element on the wire in each gather of a kernel: forward, backward, forward again.

    Codes below 8 bits travel as bytes.
    """
    high = jnp.dtype(run.sizes.compute_dtype).itemsize
    if recipe.quantizes and not _gathers_codes(run, kernel, recipe):
        return (high,) * (2 if run.casts_again(path) else 1)
    forward, backward = (
        high if q is None else math.ceil(q.format.bits / 8) for q in recipe.quantizers_of(Role.RHS)
    )
    return (forward, backward, forward)[: 3 if run.product_again(path) else 2]


def _gathers_codes(run: Run, kernel: Kernel, recipe: Recipe) -> bool:
    assert kernel.fsdp is not None
    shard = list(kernel.shape)
    shard[kernel.fsdp] //= run.mesh.fsdp
    dims = Dimensions.of(2, len(shard), (((1,), (0,)), ((), ())))
    return can_gather_codes(recipe, dims, tuple(shard), Gather((FSDP_AXIS,), kernel.fsdp))


def _amax_messages(
    run: Run, kernels: Mapping[str, Kernel], recipes: Mapping[str, Recipe]
) -> list[Message]:
    """Amaxes and counts once a step; with current scaling amaxes before each pass of a layer."""
    group = run.mesh.data * run.mesh.fsdp, run.mesh.tensor
    observed = passes = numbers = 0
    for path, recipe in recipes.items():
        calls = kernels[path].layers * run.micro_batches
        observed += kernels[path].layers * recipe.stateful
        needed = [any(q and q.needs_tensor_amax for q in recipe.quantizers_of(r)) for r in Role]
        if any(needed) and not recipe.delayed and recipe.amax_scope == "global":
            forward = 2 if run.casts_again(path) else 1
            passes += calls * (forward + 1)
            numbers += calls * (forward * sum(needed[:2]) + needed[2])
    counted = len(Role) * len(Column) * observed
    return [
        Message("loss and its tokens", "all-reduce", 4 * 2, 2, *group),
        Message("amaxes and counts", "all-reduce", 4 * counted, min(counted, 1), *group),
        Message("amaxes of current scaling", "all-reduce", 4 * numbers, passes, *group),
    ]


def _tensor_message(run: Run, kernels: Mapping[str, Kernel]) -> Message:
    """The activations that tensor parallelism sums, in bf16; with `sequence` in two halves."""
    payload = count = 0
    for path, kernel in kernels.items():
        if kernel.tensor is not None:
            # Split by rows, its result is summed; split by columns, the gradient of its input.
            shape, by_rows = kernel.gemm(run), kernel.tensor == 0
            passes = 2 if by_rows and run.product_again(path) else 1
            calls = kernel.layers * run.micro_batches * passes
            payload += HIGH_BYTES * calls * shape.m * (shape.n if by_rows else shape.k)
            count += calls
    return Message("activations", "all-reduce", payload, count, run.mesh.tensor, 1)
