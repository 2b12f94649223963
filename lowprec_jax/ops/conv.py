"""The quantized convolution: three convolutions with formats of their own.

As `lowprec_jax.ops.dot_general`: ``fwd = lhs * rhs``, ``dgrad`` of the output gradient and rhs,
``wgrad`` of lhs and the output gradient, each operand quantized as the recipe says for that
product. Differs: Hadamard rotations are left out, which cancel along a contracted axis of a matmul
but not along a window.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.numerics import Quantizer
from lowprec_jax.ops import backends, sinks
from lowprec_jax.ops.conv_product import Convolution, multiply
from lowprec_jax.ops.observation import amaxes_of, observation_of, observe
from lowprec_jax.ops.operands import Forms, as_codes, forms_of, keep, known_of
from lowprec_jax.ops.randomness import rounding_key
from lowprec_jax.ops.site_state import (
    Rounding,
    read_rounding,
    read_state,
    require_rounding,
    require_sink,
)
from lowprec_jax.recipes import Gemm, Recipe, Role, get_recipe


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
    *,
    recipe: Recipe | str,
    state: Mapping[str, Any] | None = None,
    out_sharding=None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, computed as a recipe says.

    Args:
      lhs: float array, the input.
      rhs: float array, the kernel.
      window_strides: as in `jax.lax.conv_general_dilated`.
      padding: as there.
      lhs_dilation: as there.
      rhs_dilation: as there.
      dimension_numbers: as there.
      feature_group_count: as there.
      batch_group_count: as there.
      precision: for convolutions that the recipe leaves in high precision.
      preferred_element_type: type of the result; default: the promoted type of the operands.
      recipe: a recipe or its name. Its backend is one that platforms choose among; each of them
        upcasts, since XLA has no convolution of codes.
      state: scaling state of this call site, as in `lowprec_jax.ops.dot_general`.
      out_sharding: sharding of the result on a mesh with explicit axes.

    Raises:
      TypeError: an operand is no float array, and the recipe quantizes.
      ValueError: delayed scaling or stochastic rounding without a state; differentiated without a
        sink where the recipe is delayed, or where operands are split on a mesh with explicit axes;
        a backend that is unknown, or for studies of matmuls.
    """
    recipe = get_recipe(recipe)
    _check_backend(recipe)
    convolution = Convolution(
        window_strides=_as_tuples(window_strides),
        padding=_as_tuples(padding),
        lhs_dilation=_as_tuples(lhs_dilation),
        rhs_dilation=_as_tuples(rhs_dilation),
        dimension_numbers=lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers),
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        out_sharding=out_sharding,
    )
    if not recipe.quantizes:
        return convolution.forward(
            lhs, rhs, precision=precision, preferred_element_type=preferred_element_type
        )
    return _quantized(lhs, rhs, convolution, recipe, state, preferred_element_type, precision)


def _check_backend(recipe: Recipe) -> None:
    backends.check_backend(recipe.backend)
    if recipe.quantizes and backends.is_study(recipe.backend):
        raise ValueError(
            f"conv_general_dilated: backend {recipe.backend!r} of recipe {recipe.name!r} has no "
            "convolution; use 'native' or 'upcast', or leave convolutions to a recipe without it."
        )


def _quantized(lhs, rhs, convolution, recipe: Recipe, state, dtype, precision) -> jax.Array:
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (lhs, rhs)):
        raise TypeError(
            f"conv_general_dilated: recipe {recipe.name!r} multiplies floats; given {lhs.dtype} x "
            f"{rhs.dtype}. Convert them first, or use recipe 'none'."
        )
    sink, history = read_state(recipe, state, "conv_general_dilated")
    rounding = read_rounding(recipe, state)
    if recipe.delayed and history is None:
        recipe = dataclasses.replace(recipe, name="calibration", fwd=None, dgrad=None, wgrad=None)
    call = _Call(
        recipe=_without_rotation(recipe),
        convolution=convolution,
        dtype=jnp.dtype(dtype or jnp.promote_types(lhs.dtype, rhs.dtype)),
        precision=precision,
        lhs=_Like(lhs.shape, lhs.dtype),
        rhs=_Like(rhs.shape, rhs.dtype),
    )
    axes = compat.varying_axes(lhs) | compat.varying_axes(rhs)
    lhs, rhs = compat.to_varying(lhs, axes), compat.to_varying(rhs, axes)
    return _conv(call, lhs, rhs, history, sink, rounding)


def _as_tuples(x: Any) -> Any:
    """Nested sequences as tuples, which are hashable; strings and numbers as they are."""
    return tuple(map(_as_tuples, x)) if isinstance(x, Iterable) and not isinstance(x, str) else x


@dataclasses.dataclass(frozen=True)
class _Like:
    """Shape and type that the gradient of an operand must have."""

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call."""

    recipe: Recipe
    convolution: Convolution
    dtype: Any
    precision: Any
    lhs: _Like
    rhs: _Like


def _forms_of(x, role: Role, known, call: _Call, key=None) -> Forms:
    # Of the dimension numbers it reads the groups only, which a convolution has too.
    return forms_of(x, role, known, call.recipe, call.convolution, key)  # pyright: ignore[reportArgumentType]


def _without_rotation(recipe: Recipe) -> Recipe:
    def side(quantizer: Quantizer | None) -> Quantizer | None:
        return quantizer and dataclasses.replace(quantizer, hadamard=0)

    gemms = {
        name: gemm and Gemm(side(gemm.left), side(gemm.right))
        for name in ("fwd", "dgrad", "wgrad")
        for gemm in (getattr(recipe, name),)
    }
    return dataclasses.replace(recipe, **gemms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(call: _Call, lhs, rhs, history, sink, rounding: Rounding):
    del rounding  # of the output gradient
    out, _, counts = _forward(call, lhs, rhs, history, observing=sink is not None)
    if counts is not None:
        sinks.write(sink, observation_of(counts, (lhs.size, rhs.size)))
    return out


def _fwd(call: _Call, lhs, rhs, history, sink, rounding: Rounding):
    require_sink(call.recipe, sink)
    require_rounding(call.recipe, rounding)
    _check_mesh(lhs, rhs)
    out, kept, counts = _forward(call, lhs, rhs, history, observing=sink is not None)
    if counts is not None and not isinstance(sink, sinks.Probe):
        # As in `dot_general`: the amaxes already here, for a frozen trunk.
        sinks.write(sink, amaxes_of(counts))
    return out, (*kept, history, counts, sink, rounding)


def _check_mesh(*operands: jax.Array) -> None:
    shardings = compat.explicit_shardings(*operands)
    if any(sharding is not None and any(sharding.spec) for sharding in shardings):
        raise ValueError(
            "conv_general_dilated cannot be differentiated where operands are split on a mesh with "
            "explicit axes, nor can that of JAX: their transposes have no out_sharding. Use a mesh "
            "with AxisType.Auto axes, or jax.sharding.auto_axes around the layer."
        )


def _forward(call: _Call, lhs, rhs, history, *, observing: bool):
    """The product, what the backward pass keeps, and what was observed of the operands."""
    recipe, convolution = call.recipe, call.convolution
    known = known_of({Role.LHS: lhs, Role.RHS: rhs}, recipe, history)
    left = _forms_of(lhs, Role.LHS, known, call)
    right = _forms_of(rhs, Role.RHS, known, call)
    gemm = recipe.gemm("fwd")
    out = multiply(convolution.forward, left.first, right.first, gemm, precision=call.precision)
    kept = keep(left.second, "quantized_lhs"), keep(right.second, "quantized_rhs")
    counts = None
    if observing:
        counts = observe({Role.LHS: (lhs, left), Role.RHS: (rhs, right)}, recipe, known)
    return out.astype(call.dtype), kept, counts


def _bwd(call: _Call, residuals, grad):
    kept_lhs, kept_rhs, history, counts, sink, rounding = residuals
    recipe, convolution = call.recipe, call.convolution
    known = known_of({Role.OUTPUT_GRAD: grad}, recipe, history)
    key = rounding and rounding_key(grad, *rounding)
    forms = _forms_of(grad, Role.OUTPUT_GRAD, known, call, key)
    options = {"precision": call.precision, "backward": True}
    dgrad = functools.partial(convolution.dgrad, shape=call.lhs.shape)
    wgrad = functools.partial(convolution.wgrad, shape=call.rhs.shape)
    dlhs = multiply(dgrad, forms.first, as_codes(kept_rhs), recipe.gemm("dgrad"), **options)
    drhs = multiply(wgrad, as_codes(kept_lhs), forms.second, recipe.gemm("wgrad"), **options)
    probe = None
    if sink is not None:
        row = observe({Role.OUTPUT_GRAD: (grad, forms)}, recipe, known)
        sizes = math.prod(call.lhs.shape), math.prod(call.rhs.shape), grad.size
        probe = sinks.write(sink, observation_of(lax.concatenate((counts, row), 0), sizes))
    return dlhs.astype(call.lhs.dtype), drhs.astype(call.rhs.dtype), None, probe, None


_conv.defvjp(_fwd, _bwd)
