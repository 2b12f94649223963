"""Operands of the grouped matmul: one scale per tensor is one per group."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.numerics import Quantizer, ScaledArray, quantize, spread
from lowprec_jax.ops.groups import Groups
from lowprec_jax.ops.operands import Forms, Operand
from lowprec_jax.recipes import Column, Recipe, Role

# Axes that the first GEMM of a role contracts, and those it leaves free; the second swaps them.
_LAYOUTS = {
    Role.LHS: ((1,), (0,)),
    Role.RHS: ((1,), (2,)),
    Role.OUTPUT_GRAD: ((1,), (0,)),
}


def grouped_forms(
    x: jax.Array, groups: Groups, role: Role, scales, recipe: Recipe, key: jax.Array | None = None
) -> Forms:
    """An operand in the form of each GEMM that uses it; one scale per tensor is one per group.

    Blocks of tokens may span groups, and nothing is rotated: a rotation would mix groups.
    """
    scales = (None, None) if scales is None else (scales[:, role, 0], scales[:, role, 1])
    contracted, free = _LAYOUTS[role]
    first, second = recipe.quantizers_of(role)
    form = _form(x, first, groups, scales[0], contracted, free, key)
    if first is None or second is None:
        return Forms(form, _form(x, second, groups, scales[1], free, contracted, key))
    if first == second and (first.per_tensor or first.axes == "forward"):
        return Forms(form, form)
    if second.axes == "own":
        contracted, free = free, contracted
    return Forms(form, _form(x, second, groups, scales[1], contracted, free, key))


def _form(x, quantizer: Quantizer | None, groups: Groups, scale, contracted, free, key) -> Operand:
    if quantizer is None:
        return x
    if not quantizer.per_tensor:
        return quantizer(x, quantizer.tile(x.shape, contracted, free), key=key)
    if scale is None:
        amax = groups.amax(x) if quantizer.needs_tensor_amax else jnp.ones(groups.count)
        scale, _ = quantizer.scales(amax)
    spread_scale = groups.spread(scale, x.ndim)
    codes = quantize(x, quantizer.format, spread_scale, rounding=quantizer.rounding, key=key)
    return dataclasses.replace(codes, scale=scale)


def is_grouped(x: Operand) -> bool:
    """Whether an operand has a scale for each group."""
    return isinstance(x, ScaledArray) and x.scale.ndim == 1


def transposed(x: Operand) -> Operand:
    """A matrix operand with its two axes swapped; scales of groups stay."""
    if isinstance(x, ScaledArray) and is_grouped(x):
        return dataclasses.replace(x, data=x.data.T)
    return x.transpose((1, 0))


def observe_groups(
    x: jax.Array, groups: Groups, role: Role, forms: Forms, recipe: Recipe
) -> jax.Array:
    """One role's observation, f32[G, 5]; only the amax and the size in high precision."""
    x = lax.stop_gradient(x)
    quantized = next((form for form in forms if isinstance(form, ScaledArray)), None)
    if quantized is None:
        seen = jnp.pad(groups.amax(x)[:, None], ((0, 0), (0, Column.NONFINITE)))
    else:
        if is_grouped(quantized):
            scale = groups.spread(quantized.scale, x.ndim)
        else:
            scale = spread(quantized.scale, x.shape, quantized.tile)
            if quantized.global_scale is not None:
                scale = scale * quantized.global_scale
        seen = groups.statistics(x, scale, quantized.format)
    return jnp.concatenate([seen, groups.elements(x)[:, None]], axis=-1)
