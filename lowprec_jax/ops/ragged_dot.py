"""The quantized grouped matmul: rows sorted by group, one matrix and one set of scales per group.

The three GEMMs, the sinks and what is kept for the backward pass are those of
`lowprec_jax.ops.dot_general`; here every scale, amax and count exists once for each group.

On CUDA, ROCm and TPU the grouped matmul of f8 operands is lowered to ``chlo.ragged_dot``. On CPU
JAX lowers it to one dense matmul over all groups, rows of other groups masked: as many times the
work as there are groups, and a NaN in the matrix of one group reaches the rows of all (0 x NaN).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.numerics import ScaledArray, decode
from lowprec_jax.ops import backends, sinks
from lowprec_jax.ops.groups import Groups
from lowprec_jax.ops.operands import Operand, as_codes, keep
from lowprec_jax.ops.ragged_operands import (
    grouped_forms,
    is_grouped,
    observe_groups,
    transposed,
)
from lowprec_jax.ops.randomness import rounding_key
from lowprec_jax.ops.site_state import (
    Rounding,
    read_rounding,
    read_state,
    require_rounding,
    require_sink,
)
from lowprec_jax.recipes import Gemm, Recipe, Role, amax_only, get_recipe, history_scales

# The operands of the three GEMMs: lhs [M, K], rhs [G, K, N], output_grad [M, N]; for wgrad, lhs is
# kept as [K, M] (see `lowprec_jax.ops.dimensions`).
_FORWARD = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
_DGRAD = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_WGRAD = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [1], [])


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    recipe: Recipe | str,
    state: Mapping[str, Any] | None = None,
    precision=None,
    preferred_element_type=None,
    backend: str | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot`, computed as a recipe says, with scales of their own for each group.

    Rows beyond the sum of `group_sizes` give zeros, get no gradient and are never observed,
    whatever they hold. A group without rows observes nothing in any role, so it keeps its scales;
    one that never had rows and was not calibrated has scale 1.

    Args:
      lhs: float [M, K], rows sorted by group.
      rhs: float [G, K, N], a matrix for each group.
      group_sizes: int [G], rows of each group; their sum is at most M.
      recipe: a recipe or its name.
      state: scaling state with a leading group axis, ``init_state(recipe, (G,))``. As in
        `dot_general`; the observation for its ``"sink"`` is f32[G, 3, 5]: a ref of that shape, an
        `IndexedSink` whose index is int32 [G] (rows of a ref f32[layers * G, 3, 5]), or a `Probe`.
      precision: for GEMMs that the recipe leaves in high precision.
      preferred_element_type: type of the result; default: the promoted type of the operands.
      backend: "native", "upcast" (exactly, to bf16), or None for what the platform of the lowering
        executes best: upcast on CPU.

    Returns:
      [M, N] of `preferred_element_type`; scaled in f32 before it is converted.

    Raises:
      ValueError: shapes that do not fit; delayed scaling without a state, or differentiated without
        a sink; a state without the group axis; an unknown backend.
      TypeError: operands that are no floats, sizes that are no integers, a sink that is an array.

    Current scaling takes the amaxes of what is on the device: rows of other devices do not count.

    Differs from: `jax.lax.ragged_dot`, which does not say what rows beyond the sum give.
    """
    recipe = get_recipe(recipe)
    _check(lhs, rhs, group_sizes, recipe, backend or recipe.backend)
    axes = frozenset[str]().union(*map(compat.varying_axes, (lhs, rhs, group_sizes)))
    lhs, rhs, group_sizes = (compat.to_varying(x, axes) for x in (lhs, rhs, group_sizes))
    if not recipe.quantizes:
        return _high_precision(lhs, rhs, group_sizes, precision, preferred_element_type)
    sink, history = read_state(recipe, state, "ragged_dot", rhs.shape[:1])
    if recipe.delayed and history is None:
        recipe = dataclasses.replace(recipe, name="calibration", fwd=None, dgrad=None, wgrad=None)
    call = _Call(
        recipe=recipe,
        dtype=jnp.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)),
        precision=precision,
        backend=backend or recipe.backend,
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
    )
    return _dot(call, lhs, rhs, group_sizes, history, sink, read_rounding(recipe, state))


def _high_precision(lhs, rhs, group_sizes, precision, dtype) -> jax.Array:
    """`lax.ragged_dot` with zeros where it leaves the result to the platform."""
    used = Groups.of_rows(group_sizes, lhs.shape[0]).used[:, None]
    product = lax.ragged_dot(
        jnp.where(used, lhs, 0),
        rhs,
        group_sizes,
        precision=precision,
        preferred_element_type=dtype,
    )
    return jnp.where(used, product, 0)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call."""

    recipe: Recipe
    dtype: Any
    precision: Any
    backend: str | None
    lhs_dtype: Any
    rhs_dtype: Any


def _check(lhs, rhs, group_sizes, recipe: Recipe, backend: str | None) -> None:
    backends.check_backend(backend)
    if backends.is_study(backend):
        raise ValueError(
            f"ragged_dot: backend {backend!r} has no grouped matmul; use 'native' or 'upcast', or "
            "leave the experts to a recipe without it."
        )
    if not (
        (lhs.ndim, rhs.ndim) == (2, 3)
        and lhs.shape[1] == rhs.shape[1]
        and group_sizes.shape == rhs.shape[:1]
    ):
        raise ValueError(
            f"ragged_dot: lhs {lhs.shape}, rhs {rhs.shape}, group_sizes {group_sizes.shape} do not "
            "fit; they must be [M, K], [G, K, N] and [G]."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"ragged_dot: group_sizes is {group_sizes.dtype}; pass int32.")
    if recipe.quantizes and not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (lhs, rhs)):
        raise TypeError(
            f"ragged_dot: recipe {recipe.name!r} multiplies floats; given {lhs.dtype} x "
            f"{rhs.dtype}. Convert them first, or use recipe 'none'."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(call: _Call, lhs, rhs, group_sizes, history, sink, rounding: Rounding):
    del rounding  # of the output gradient
    out, _, seen = _forward(call, lhs, rhs, group_sizes, history, observing=sink is not None)
    if sink is not None and seen is not None:
        sinks.write(sink, seen)
    return out


def _fwd(call: _Call, lhs, rhs, group_sizes, history, sink, rounding: Rounding):
    require_sink(call.recipe, sink)
    require_rounding(call.recipe, rounding)
    out, kept, seen = _forward(call, lhs, rhs, group_sizes, history, observing=sink is not None)
    if sink is not None and seen is not None and not isinstance(sink, sinks.Probe):
        # Amaxes only, as in `dot_general`: this rule runs twice under remat.
        sinks.write(sink, amax_only(seen))
    return out, (*kept, group_sizes, history, seen, sink, rounding)


def _forward(call: _Call, lhs, rhs, group_sizes, history, *, observing: bool):
    """The product, what the backward pass keeps, and the observation of the two operands."""
    recipe = call.recipe
    scales = None if history is None else history_scales(history, recipe)
    rows, matrices = Groups.of_rows(group_sizes, lhs.shape[0]), Groups.one_each(rhs.shape[0])
    left = grouped_forms(lhs, rows, Role.LHS, scales, recipe)
    right = grouped_forms(rhs, matrices, Role.RHS, scales, recipe)
    out = _multiply_rows(
        left.first, right.first, recipe.gemm("fwd"), group_sizes, rows, _FORWARD, call
    )
    kept = (
        keep(transposed(left.second), "quantized_lhs"),
        keep(right.second, "quantized_rhs"),
    )
    seen = None
    if observing:
        lhs_row = observe_groups(lhs, rows, Role.LHS, left, recipe)
        rhs_row = observe_groups(rhs, matrices, Role.RHS, right, recipe)
        rhs_row = jnp.where((group_sizes > 0)[:, None], rhs_row, 0)
        seen = jnp.stack([lhs_row, rhs_row, jnp.zeros_like(lhs_row)], axis=1)
    return out.astype(call.dtype), kept, seen


def _bwd(call: _Call, residuals, grad):
    kept_lhs, kept_rhs, group_sizes, history, seen, sink, rounding = residuals
    recipe = call.recipe
    scales = None if history is None else history_scales(history, recipe)
    rows = Groups.of_rows(group_sizes, grad.shape[0])
    key = rounding and rounding_key(grad, *rounding)
    forms = grouped_forms(grad, rows, Role.OUTPUT_GRAD, scales, recipe, key)
    dlhs = _multiply_rows(
        forms.first,
        as_codes(kept_rhs),
        recipe.gemm("dgrad"),
        group_sizes,
        rows,
        _DGRAD,
        call,
        backward=True,
    )
    drhs, scale = _multiply(
        as_codes(kept_lhs),
        forms.second,
        recipe.gemm("wgrad"),
        group_sizes,
        _WGRAD,
        call,
        backward=True,
    )
    drhs = drhs if scale is None else drhs * scale[:, None, None]
    probe = None
    if sink is not None:
        row = observe_groups(grad, rows, Role.OUTPUT_GRAD, forms, recipe)
        probe = sinks.write(sink, seen.at[:, Role.OUTPUT_GRAD].set(row))
    return dlhs.astype(call.lhs_dtype), drhs.astype(call.rhs_dtype), None, None, probe, None


_dot.defvjp(_fwd, _bwd)


def _multiply_rows(
    left, right, gemm: Gemm | None, group_sizes, rows: Groups, dimensions, call, *, backward=False
):
    """A product with a row for each row of `left`, f32, scaled; rows of no group are zero."""
    product, scale = _multiply(left, right, gemm, group_sizes, dimensions, call, backward=backward)
    if scale is not None:
        product = product * rows.spread(scale, 2)
    return jnp.where(rows.used[:, None], product, 0)


def _multiply(
    left: Operand,
    right: Operand,
    gemm: Gemm | None,
    group_sizes,
    dimensions,
    call: _Call,
    *,
    backward: bool,
):
    """``left x right``, f32, and what is still to scale it with, f32[G] or None.

    Scales of groups multiply the product; finer ones are multiplied into the operands.
    """
    grouped = [x for x in (left, right) if isinstance(x, ScaledArray) and is_grouped(x)]
    scale = functools.reduce(jnp.multiply, [x.scale for x in grouped]) if grouped else None
    if len(grouped) < 2:
        quantized = gemm is not None and gemm.left is not None and gemm.right is not None
        precision = lax.Precision.HIGHEST if quantized else call.precision
        operands = _values(left, right), _values(right, left)
        return _native(*operands, group_sizes, dimensions, precision), scale
    left, right = grouped
    formats = left.format, right.format
    precision = lax.Precision.HIGHEST if backward else lax.Precision.DEFAULT
    native = functools.partial(
        _native_codes, formats=formats, dimensions=dimensions, precision=precision
    )
    upcast = functools.partial(_upcast, formats=formats, dimensions=dimensions)
    operands = left.data, right.data, group_sizes
    if call.backend is None:
        return lax.platform_dependent(*operands, cpu=upcast, default=native), scale
    return (upcast if call.backend == "upcast" else native)(*operands), scale


def _values(x: Operand, partner: Operand) -> jax.Array:
    """What an operand holds, in the type of a partner in high precision, without group scales."""
    if not isinstance(x, ScaledArray):
        return x
    dtype = jnp.float32 if isinstance(partner, ScaledArray) else partner.dtype
    return decode(x.data, x.format, dtype) if is_grouped(x) else x.dequantize(dtype)


def _native_codes(left, right, group_sizes, *, formats, dimensions, precision):
    if not backends.multiplies_natively(formats):
        return _upcast(left, right, group_sizes, formats=formats, dimensions=dimensions)
    left, right = (backends.as_native(x, f) for x, f in zip((left, right), formats, strict=True))
    return _native(left, right, group_sizes, dimensions, precision)


def _native(left, right, group_sizes, dimensions, precision):
    return lax.ragged_dot_general(
        left,
        right,
        group_sizes,
        dimensions,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _upcast(left, right, group_sizes, *, formats, dimensions):
    """In bf16, exactly, behind a barrier: see `lowprec_jax.ops.backends.upcast`."""
    dtype = jnp.bfloat16 if all(fmt.exact_in_bf16 for fmt in formats) else jnp.float32
    left, right = lax.optimization_barrier(
        tuple(
            backends.upcast_operand(x, fmt, dtype)
            for x, fmt in zip((left, right), formats, strict=True)
        )
    )
    return _native(left, right, group_sizes, dimensions, None)
