"""Quantizes an unmodified NNX model: its layers get our matmul or convolution in place of JAX's."""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from lowprec_jax.nnx.conv import ConvGeneralDilated
from lowprec_jax.nnx.sites import DotGeneral, EinsumOp, Site
from lowprec_jax.recipes import Assignment, Rules, assign

Layer = nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv

# Kind of layer -> (attribute that holds its op, our op, rank of its kernel without a stack).
_KINDS: dict[type, tuple[str, Callable, Callable[[Any], int]]] = {
    nnx.Linear: ("dot_general", DotGeneral, lambda layer: 2),
    nnx.LinearGeneral: (
        "dot_general",
        DotGeneral,
        lambda layer: len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features),
    ),
    nnx.Einsum: ("einsum_op", EinsumOp, lambda layer: len(layer.kernel_shape)),
    nnx.Conv: ("conv_general_dilated", ConvGeneralDilated, lambda layer: len(layer.kernel_shape)),
}


def layers(model: Any) -> Iterator[tuple[str, Layer]]:
    """``(path, layer)`` of every layer that `quantize` can reach, components joined by ``/``.

    Args:
      model: a module, or anything that may hold some.
    """
    for path, value in nnx.iter_graph(model):
        if _kind(value):
            yield "/".join(map(str, path)), value


def quantize(model: nnx.Module, rules: Rules) -> nnx.Module:
    """Makes the layers of a model compute as rules say. Changes `model` and returns it.

    Parameters keep their names and values. Layers stacked for a scan (by `nnx.vmap`) get state
    with the same leading axis. Calling it again replaces recipes and starts scaling state anew.

    Args:
      model: any NNX model made of `nnx.Linear`, `nnx.LinearGeneral` (attention projections too),
        `nnx.Einsum` and `nnx.Conv`.
      rules: a recipe or its name (embeddings, heads, routers and norms stay in high precision), or
        a sequence of rules; see `lowprec_jax.recipes`.

    Returns:
      The same model.

    Raises:
      UserError: a rule matches no layer, or a recipe is unknown.
    """
    found = dict(layers(model))
    for assignment in assign(found, rules):
        _replace(found[assignment.path], assignment)
    return model


def op_attribute(layer: Layer) -> str:
    """Name of the attribute that holds the op of a layer from `layers`."""
    kind = _kind(layer)
    assert kind is not None
    return _KINDS[kind][0]


def stack_of(layer: Layer) -> tuple[int, ...]:
    """Leading axes of a layer from `layers`: those of the stack it is in, if any."""
    kind = _kind(layer)
    assert kind is not None
    shape = layer.kernel.shape
    return tuple(shape[: len(shape) - _KINDS[kind][2](layer)])


def _replace(layer: Layer, assignment: Assignment) -> None:
    kind = _kind(layer)
    assert kind is not None
    attribute, op, _ = _KINDS[kind]
    current = getattr(layer, attribute)
    has_recipe = isinstance(current, Site)
    if not assignment.recipe.quantizes and not has_recipe:
        return
    op = type(current) if has_recipe else op  # a smoothed layer stays one
    setattr(layer, attribute, nnx.data(op(assignment.recipe, stack=stack_of(layer))))


def _kind(value: Any) -> type | None:
    return next((kind for kind in _KINDS if isinstance(value, kind)), None)
