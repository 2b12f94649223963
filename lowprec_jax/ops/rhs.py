"""A right operand that is quantized once for many calls of `dot_general`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.numerics import ScaledArray
from lowprec_jax.ops.gather import Gather
from lowprec_jax.ops.operands import Operand, Scales, as_bytes, forms_of, known_of, without_scale
from lowprec_jax.recipes import Recipe, Role, get_recipe


class _KernelAxes(NamedTuple):
    """Dimension numbers of the right operand alone; see `lowprec_jax.ops.operands.AxisGroups`."""

    groups: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]


def quantize_rhs(
    rhs: jax.Array,
    contracted: Sequence[int],
    *,
    recipe: Recipe | str,
    history: jax.Array | None = None,
    gather: Gather | None = None,
    stack: int = 0,
) -> ScaledArray | None:
    """A right operand as `dot_general` quantizes it in the forward pass, its codes as bytes.

    For its argument ``rhs_quantized``, where the same `rhs` is multiplied many times in a step: by
    micro-batches, or again under remat. It has no gradient.

    Args:
      rhs: float array, of the type that `dot_general` will get it in.
      contracted: its contracted axes, not counting those of a stack; no batch axes.
      recipe: the recipe.
      history: ``amax_history`` of the call site; needed with delayed scaling.
      gather: how `rhs` is sharded; the codes are those of the shard.
      stack: number of leading axes of a stack of layers.

    Returns:
      The codes and scales, with the axes of the stack (under delayed scaling without the scale,
      which `dot_general` has); None if the recipe does not quantize it, or there is no history.
    """
    recipe = get_recipe(recipe)
    if recipe.fwd is None or recipe.fwd.right is None or (recipe.delayed and history is None):
        return None
    rhs = lax.stop_gradient(rhs)
    if recipe.delayed and not recipe.fwd.right.hadamard:  # whose scale is one per tensor
        return _form_by_history(rhs, history, recipe=recipe)
    make = functools.partial(
        _first_form, contracted=tuple(contracted), recipe=recipe, gather=gather
    )
    for _ in range(stack):
        make = jax.vmap(make)
    return make(rhs, history if recipe.delayed else None)


# Compiled by themselves, so that kernels of equal shapes are traced and lowered once.
@functools.partial(jax.jit, static_argnames="recipe")
def _form_by_history(rhs: jax.Array, history: jax.Array, *, recipe: Recipe) -> Operand | None:
    """Of a stack too, without `jax.vmap`, which traces everything twice."""
    assert recipe.fwd is not None
    assert recipe.fwd.right is not None
    known = known_of({}, recipe, history)
    assert isinstance(known, Scales)
    scale, factor = known.scale[Role.RHS][0], known.reciprocal[Role.RHS][0]
    factor = lax.reshape(factor, (*factor.shape, *(1,) * (rhs.ndim - factor.ndim)))
    form = recipe.fwd.right(rhs, scale=scale, factor=jnp.broadcast_to(factor, rhs.shape))
    return without_scale(as_bytes(form), recipe.fwd.right)


@functools.partial(jax.jit, static_argnames=("contracted", "recipe", "gather"))
def _first_form(rhs: jax.Array, history: jax.Array | None, *, contracted, recipe, gather):
    free = tuple(axis for axis in range(rhs.ndim) if axis not in contracted)
    axes = _KernelAxes([((), ()), (contracted, free), ((), ())])  # by role
    known = known_of({Role.RHS: rhs}, recipe, history, gather)
    return as_bytes(forms_of(rhs, Role.RHS, known, recipe, axes).first)


def checked_codes(quantized: ScaledArray | None, recipe: Recipe) -> Operand | None:
    """`quantized` as bytes; None if the forward GEMM is in high precision.

    Raises:
      ValueError: it is in another format than the recipe's.
    """
    if quantized is None or recipe.fwd is None:
        return None
    wanted = recipe.fwd.right
    if wanted is None or quantized.format != wanted.format:
        raise ValueError(
            f"rhs_quantized is {quantized.format}, but recipe {recipe.name!r} multiplies "
            f"{wanted and wanted.format}; quantize it to that."
        )
    return as_bytes(quantized)
