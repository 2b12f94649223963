"""Tells the layers of an NNX model that their kernels are sharded."""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from lowprec_jax.nnx.quantize import layers, op_attribute, stack_of
from lowprec_jax.nnx.sites import DotGeneral
from lowprec_jax.ops import Gather


def gather_kernels(model: nnx.Module, kernels: Mapping[str, Gather]) -> set[str]:
    """Makes linear layers bring their sharded kernels together. Changes `model`.

    Call it after `quantize`. A layer in high precision gets an op with recipe "none", which gathers
    in high precision.

    Args:
      model: any NNX model of `nnx.Linear` and `nnx.LinearGeneral` layers.
      kernels: how each kernel is sharded, by its path (``"blocks/mlp/down/kernel"``); ``axis``
        counts the leading axes of a stack of layers.

    Returns:
      The paths that were found. What is not a kernel of such a layer (an embedding, the kernel of
      an `nnx.Einsum`) is left to the caller: see `lowprec_jax.ops.gather`.
    """
    found = set()
    for path, layer in layers(model):
        kernel, attribute = f"{path}/kernel", op_attribute(layer)
        if kernel not in kernels or attribute != "dot_general":
            continue
        op = getattr(layer, attribute)
        if not isinstance(op, DotGeneral):
            op = DotGeneral("none")
            setattr(layer, attribute, nnx.data(op))
        how = kernels[kernel]
        op.gather = nnx.static(dataclasses.replace(how, axis=how.axis - len(stack_of(layer))))
        found.add(kernel)
    return found
