"""The kernels of an NNX model, quantized once for all calls of a step."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from lowprec_jax import ops
from lowprec_jax.nnx.quantize import layers, op_attribute, stack_of
from lowprec_jax.nnx.sites import DotGeneral, iter_sites
from lowprec_jax.numerics import ScaledArray
from lowprec_jax.recipes import Recipe


def quantize_kernels(nodes: Sequence[Any]) -> dict[str, ScaledArray]:
    """The quantized kernels of linear layers, by the path of their call site.

    Args:
      nodes: modules, or anything that may hold them, as for `iter_sites`.
    """
    # Subclasses of the op may change their operands.
    sites = {
        id(site): path
        for path, site in iter_sites(*nodes)
        if type(site) is DotGeneral and not _reduces_amax(site.recipe)
    }
    kernels = {}
    for _, layer in layers(list(nodes)):
        site = getattr(layer, op_attribute(layer))
        if id(site) in sites and not getattr(layer, "batch_axis", ()):
            kernels[sites[id(site)]] = _quantized(layer, site)
    return {path: kernel for path, kernel in kernels.items() if kernel is not None}


def _reduces_amax(recipe: Recipe) -> bool:
    """Whether every call reduces the amax of the kernel over devices, with that of its input."""
    fwd = recipe.gemm("fwd")
    right = fwd and fwd.right
    return not recipe.delayed and right is not None and right.needs_tensor_amax


def _quantized(layer: Any, site: DotGeneral) -> ScaledArray | None:
    kernel = layer.kernel.get_value()
    inputs = len(layer.in_features) if isinstance(layer, nnx.LinearGeneral) else 1
    return ops.quantize_rhs(
        kernel if layer.dtype is None else kernel.astype(layer.dtype),
        range(inputs),
        recipe=site.recipe,
        history=site.get_scaling().get("amax_history"),
        gather=site.gather,
        stack=len(stack_of(layer)),
    )
