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
from lowprec_jax.errors import did_you_mean
from lowprec_jax.numerics import Format, ScaledArray, quantize
from lowprec_jax.ops import backends, sinks
from lowprec_jax.ops.groups import Groups
from lowprec_jax.ops.operands import Forms, Operand, as_codes, keep
from lowprec_jax.ops.site_state import read_state, require_sink
from lowprec_jax.recipes import Column, Recipe, Role, amax_only, get_recipe

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
    _check(lhs, rhs, group_sizes, recipe, backend)
    axes = frozenset[str]().union(*map(compat.varying_axes, (lhs, rhs, group_sizes)))
    lhs, rhs, group_sizes = (compat.to_varying(x, axes) for x in (lhs, rhs, group_sizes))
    if not recipe.quantizes:
        return _high_precision(lhs, rhs, group_sizes, precision, preferred_element_type)
    sink, amax = read_state(recipe, state, "ragged_dot", rhs.shape[:1])
    if recipe.delayed and amax is None:
        recipe = dataclasses.replace(recipe, name="calibration", fwd=None, dgrad=None, wgrad=None)
    call = _Call(
        recipe=recipe,
        dtype=jnp.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)),
        precision=precision,
        backend=backend,
        lhs_dtype=lhs.dtype,
        rhs_dtype=rhs.dtype,
    )
    return _dot(call, lhs, rhs, group_sizes, amax, sink)


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
    if backend not in (None, *backends.BACKENDS):
        raise ValueError(
            f"Unknown backend {backend!r}. Known: {', '.join(backends.BACKENDS)}."
            + did_you_mean(backend, backends.BACKENDS)
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
def _dot(call: _Call, lhs, rhs, group_sizes, amax, sink):
    out, _, seen = _forward(call, lhs, rhs, group_sizes, amax, observing=sink is not None)
    if sink is not None and seen is not None:
        sinks.write(sink, seen)
    return out


def _fwd(call: _Call, lhs, rhs, group_sizes, amax, sink):
    require_sink(call.recipe, sink)
    out, kept, seen = _forward(call, lhs, rhs, group_sizes, amax, observing=sink is not None)
    if sink is not None and seen is not None and not isinstance(sink, sinks.Probe):
        # Amaxes only, as in `dot_general`: this rule runs twice under remat.
        sinks.write(sink, amax_only(seen))
    return out, (*kept, group_sizes, amax, seen, sink)


def _forward(call: _Call, lhs, rhs, group_sizes, amax, *, observing: bool):
    """The product, what the backward pass keeps, and the observation of the two operands."""
    recipe = call.recipe
    rows, matrices = Groups.of_rows(group_sizes, lhs.shape[0]), Groups.one_each(rhs.shape[0])
    left = _forms_of(lhs, rows, Role.LHS, amax, recipe)
    right = _forms_of(rhs, matrices, Role.RHS, amax, recipe)
    fwd, dgrad, wgrad = recipe.fwd, recipe.dgrad, recipe.wgrad
    out = _multiply_rows(
        left[fwd and fwd.left], right[fwd and fwd.right], group_sizes, rows, _FORWARD, call
    )
    kept = (
        keep(left[wgrad and wgrad.left], "quantized_lhs", (1, 0)),
        keep(right[dgrad and dgrad.right], "quantized_rhs"),
    )
    seen = None
    if observing:
        lhs_row = _observe(lhs, rows, Role.LHS, left, recipe)
        rhs_row = _observe(rhs, matrices, Role.RHS, right, recipe)
        rhs_row = jnp.where((group_sizes > 0)[:, None], rhs_row, 0)
        seen = jnp.stack([lhs_row, rhs_row, jnp.zeros_like(lhs_row)], axis=1)
    return out.astype(call.dtype), kept, seen


def _bwd(call: _Call, residuals, grad):
    kept_lhs, kept_rhs, group_sizes, amax, seen, sink = residuals
    recipe = call.recipe
    rows = Groups.of_rows(group_sizes, grad.shape[0])
    forms = _forms_of(grad, rows, Role.OUTPUT_GRAD, amax, recipe)
    dgrad, wgrad = recipe.dgrad, recipe.wgrad
    dlhs = _multiply_rows(
        forms[dgrad and dgrad.left],
        as_codes(kept_rhs),
        group_sizes,
        rows,
        _DGRAD,
        call,
        backward=True,
    )
    drhs, scale = _multiply(
        as_codes(kept_lhs),
        forms[wgrad and wgrad.right],
        group_sizes,
        _WGRAD,
        call,
        backward=True,
    )
    drhs = drhs if scale is None else drhs * scale[:, None, None]
    probe = None
    if sink is not None:
        row = _observe(grad, rows, Role.OUTPUT_GRAD, forms, recipe)
        probe = sinks.write(sink, seen.at[:, Role.OUTPUT_GRAD].set(row))
    return dlhs.astype(call.lhs_dtype), drhs.astype(call.rhs_dtype), None, None, probe


_dot.defvjp(_fwd, _bwd)


def _forms_of(x: jax.Array, groups: Groups, role: Role, amax, recipe: Recipe) -> Forms:
    """An operand in every form its GEMMs need, each `ScaledArray` with a scale f32[G] per group."""
    forms: Forms = {None: x}
    needed = [fmt for fmt in recipe.formats_of(role) if fmt is not None]
    if not needed:
        return forms
    known = groups.amax(x) if amax is None else amax[:, role]
    for fmt in needed:
        scale = recipe.scale(known, fmt)
        codes = quantize(x, fmt, groups.spread(scale, x.ndim))
        forms[fmt] = dataclasses.replace(codes, scale=scale)
    return forms


def _observe(
    x: jax.Array, groups: Groups, role: Role, forms: Mapping[Format | None, Operand], recipe: Recipe
) -> jax.Array:
    """One role's observation, f32[G, 5]; only the amax and the size in high precision."""
    x = lax.stop_gradient(x)
    quantized = forms[recipe.format_of(role)]
    if isinstance(quantized, ScaledArray):
        seen = groups.statistics(x, quantized.scale, quantized.format)
    else:
        seen = jnp.pad(groups.amax(x)[:, None], ((0, 0), (0, Column.NONFINITE)))
    return jnp.concatenate([seen, groups.elements(x)[:, None]], axis=-1)


def _multiply_rows(left, right, group_sizes, rows: Groups, dimensions, call, *, backward=False):
    """A product with a row for each row of `left`, f32, scaled; rows of no group are zero."""
    product, scale = _multiply(left, right, group_sizes, dimensions, call, backward=backward)
    if scale is not None:
        product = product * rows.spread(scale, 2)
    return jnp.where(rows.used[:, None], product, 0)


def _multiply(left: Operand, right: Operand, group_sizes, dimensions, call: _Call, *, backward):
    """``left x right`` of the codes, f32, and what to scale it with, f32[G] or None."""
    if not (isinstance(left, ScaledArray) and isinstance(right, ScaledArray)):
        assert not isinstance(left, ScaledArray)
        assert not isinstance(right, ScaledArray)
        return _native(left, right, group_sizes, dimensions, call.precision), None
    precision = lax.Precision.HIGHEST if backward else lax.Precision.DEFAULT
    options = {"dimensions": dimensions, "precision": precision}
    native, upcast = (functools.partial(f, **options) for f in (_native, _upcast))
    operands = left.data, right.data, group_sizes
    if call.backend is None:
        product = lax.platform_dependent(*operands, cpu=upcast, default=native)
    else:
        product = {"native": native, "upcast": upcast}[call.backend](*operands)
    return product, left.scale * right.scale


def _native(left, right, group_sizes, dimensions, precision):
    return lax.ragged_dot_general(
        left,
        right,
        group_sizes,
        dimensions,
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _upcast(left, right, group_sizes, dimensions, precision):
    """In bf16, exactly, behind a barrier: see `lowprec_jax.ops.backends.upcast`."""
    del precision
    left, right = lax.optimization_barrier((left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)))
    return _native(left, right, group_sizes, dimensions, None)
