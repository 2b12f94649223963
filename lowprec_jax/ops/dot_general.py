"""The quantized `dot_general`: three GEMMs with formats of their own.

Forward: quantize both operands, multiply the codes, scale the product. Backward: quantize the
output gradient, multiply it with the codes kept from the forward pass. They are kept as u8:
`jax.checkpoint` passes f8 residuals through `reduce_precision(4, 3)`, which turns every e4m3fn
code of 256 and above into NaN, and XLA:CPU cannot update slices of an f8 stack in place.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.numerics import ScaledArray
from lowprec_jax.ops import sinks
from lowprec_jax.ops.dimensions import Dimensions
from lowprec_jax.ops.gather import Gather, gather, reduce_scatter
from lowprec_jax.ops.observation import amaxes_of, observation_of, observe
from lowprec_jax.ops.operands import (
    Known,
    Operand,
    Scales,
    as_bytes,
    as_codes,
    can_gather_codes,
    forms_of,
    gathered,
    keep,
    known_of,
    without_scale,
)
from lowprec_jax.ops.product import product
from lowprec_jax.ops.randomness import rounding_key
from lowprec_jax.ops.rhs import checked_codes
from lowprec_jax.ops.site_state import (
    Rounding,
    read_rounding,
    read_state,
    require_rounding,
    require_sink,
)
from lowprec_jax.recipes import Recipe, Role, get_recipe


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    *,
    recipe: Recipe | str,
    state: Mapping[str, Any] | None = None,
    rhs_quantized: ScaledArray | None = None,
    rhs_gather: Gather | None = None,
    out_sharding=None,
    backend: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general`, computed as a recipe says.

    With delayed scaling, `state` gives the scales. Its entry ``"sink"`` takes what the op observes:
    a ref, an `IndexedSink` or a `Probe` (`lowprec_jax.state` makes them). Without a sink nothing is
    observed, as in evaluation. A state that has a sink but no ``amax_history`` is being calibrated:
    the op computes in high precision and only observes.

    Args:
      lhs: float array.
      rhs: float array.
      dimension_numbers: as in `jax.lax.dot_general`.
      precision: for GEMMs that the recipe leaves in high precision.
      preferred_element_type: type of the result; default: the promoted type of the operands.
      recipe: a recipe or its name.
      state: scaling state of this call site, needed with delayed scaling.
      rhs_quantized: `rhs` already quantized, by `quantize_rhs`, once for many calls. The value is
        computed from these codes; the gradient goes to `rhs`. Ignored where a sharded kernel is
        gathered in high precision.
      rhs_gather: how `rhs` is sharded, see `Gather`.
      out_sharding: sharding of the result on a mesh with explicit axes.
      backend: see `lowprec_jax.ops.backends.dot`.

    Returns:
      The product, of `preferred_element_type`; scaled in f32 before it is converted.

    Raises:
      ValueError: delayed scaling without a state, or differentiated without a sink; `rhs_quantized`
        in another format than the recipe's.
      TypeError: operands that are no floats; a sink that is an array.

    Differs from: Flax `fp8_ops` and Transformer Engine, which return the next state as a gradient
      (summed when a layer is used twice, zeroed when it is not used).
    """
    recipe = get_recipe(recipe)
    if not recipe.quantizes:
        plain = functools.partial(
            lax.dot_general,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
        if rhs_gather is None:
            return plain(lhs, rhs)
        # Under checkpoint the whole kernel is gathered again instead of kept.
        return jax.checkpoint(lambda lhs, rhs: plain(lhs, gather(rhs, rhs_gather)))(lhs, rhs)
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (lhs, rhs)):
        raise TypeError(
            f"dot_general: recipe {recipe.name!r} multiplies floats; given {lhs.dtype} x "
            f"{rhs.dtype}. Convert them first, or use recipe 'none'."
        )
    sink, history = read_state(recipe, state, "dot_general")
    if recipe.delayed and history is None:
        recipe = dataclasses.replace(recipe, name="calibration", fwd=None, dgrad=None, wgrad=None)
    axes = compat.varying_axes(lhs) | compat.varying_axes(rhs)
    lhs, rhs = compat.to_varying(lhs, axes), compat.to_varying(rhs, axes)
    dims = Dimensions.of(lhs.ndim, rhs.ndim, dimension_numbers)
    codes = checked_codes(rhs_quantized, recipe)
    if rhs_gather is not None and not can_gather_codes(recipe, dims, rhs.shape, rhs_gather):
        rhs, rhs_gather, codes = gather(rhs, rhs_gather), None, None
    like_lhs, like_rhs = _Like.of(lhs, rhs)
    call = _Call(
        recipe=recipe,
        dims=dims,
        dtype=jnp.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)),
        precision=precision,
        gather=rhs_gather,
        out_sharding=out_sharding,
        backend=backend or recipe.backend,
        lhs=like_lhs,
        rhs=like_rhs,
    )
    rounding = read_rounding(recipe, state)
    return _dot(call, lhs, rhs, history, sink, codes, rounding)


@dataclasses.dataclass(frozen=True)
class _Like:
    """Type and explicit sharding that the gradient of an operand must have, and its size."""

    dtype: Any
    sharding: Any
    size: int

    @classmethod
    def of(cls, *operands: jax.Array) -> "list[_Like]":
        shardings = compat.explicit_shardings(*operands)
        return [cls(x.dtype, s, x.size) for x, s in zip(operands, shardings, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call."""

    recipe: Recipe
    dims: Dimensions
    dtype: Any
    precision: Any
    gather: Gather | None
    out_sharding: Any
    backend: str | None
    lhs: _Like
    rhs: _Like


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(call: _Call, lhs, rhs, history, sink, codes, rounding: Rounding):
    del rounding  # of the output gradient
    out, _, counts = _forward(call, lhs, rhs, history, codes, observing=sink is not None)
    if counts is not None:
        sinks.write(sink, observation_of(counts, (call.lhs.size, call.rhs.size)))
    return out


def _fwd(call: _Call, lhs, rhs, history, sink, codes, rounding: Rounding):
    require_sink(call.recipe, sink)
    require_rounding(call.recipe, rounding)
    out, kept, counts = _forward(call, lhs, rhs, history, codes, observing=sink is not None)
    if counts is not None and not isinstance(sink, sinks.Probe):
        # The amaxes already here, for a trunk that is frozen by stop_gradient on its output: its
        # backward rule never runs. Not the counts: under remat this rule runs twice.
        sinks.write(sink, amaxes_of(counts))
    left, right = (
        None if x is None else keep(x, name)
        for x, name in zip(kept, ("quantized_lhs", "quantized_rhs"), strict=True)
    )
    if history is not None:
        left = without_scale(left, call.recipe.quantizers_of(Role.LHS)[1])
        right = without_scale(right, call.recipe.quantizers_of(Role.RHS)[1])
    # Codes that were given are kept as they came: a scan stacks nothing that it was given.
    kept = left, codes if right is None else right
    return out, (kept, history, counts, sink, rounding)


# Compiled functions of their own, so that JAX traces them once for all layers of the same shapes.
@functools.partial(jax.jit, static_argnames=("call", "observing"))
def _forward(call: _Call, lhs, rhs, history, codes, *, observing: bool):
    """The product, the operands as `wgrad` and `dgrad` take them, and what was observed of them."""
    recipe, dims = call.recipe, call.dims
    known = known_of({Role.LHS: lhs, Role.RHS: rhs}, recipe, history, call.gather)
    left = forms_of(lhs, Role.LHS, known, recipe, dims)
    given = None if codes is None else as_codes(_with_scale(codes, known, Role.RHS, 0))
    right = forms_of(rhs, Role.RHS, known, recipe, dims, given=given)
    out = product(
        left.first,
        gathered(right.first, call.gather),
        recipe.gemm("fwd"),
        dims.forward,
        precision=call.precision,
        out_sharding=call.out_sharding,
        backend=call.backend,
    )
    kept = (
        as_bytes(left.second).transpose(dims.lhs_to_wgrad),
        None if right.second is given else as_bytes(right.second),
    )
    counts = None
    if observing:
        counts = observe({Role.LHS: (lhs, left), Role.RHS: (rhs, right)}, recipe, known)
    return out.astype(call.dtype), kept, counts


def _bwd(call: _Call, residuals, grad):
    kept, history, counts, sink, rounding = residuals
    dlhs, drhs, counts = _backward(call, kept, history, rounding, grad, counts)
    probe = None
    if sink is not None:
        sizes = call.lhs.size, call.rhs.size, grad.size
        probe = sinks.write(sink, observation_of(counts, sizes))
    return dlhs, drhs, None, probe, None, None


@functools.partial(jax.jit, static_argnames="call")
def _backward(call: _Call, kept, history, rounding, grad, counts):
    """The gradients of the operands, and what was observed of all three."""
    recipe, dims = call.recipe, call.dims
    known = known_of({Role.OUTPUT_GRAD: grad}, recipe, history)
    kept_lhs = as_codes(_with_scale(kept[0], known, Role.LHS, 1))
    kept_rhs = as_codes(_with_scale(kept[1], known, Role.RHS, 1))
    key = rounding and rounding_key(grad, *rounding)
    forms = forms_of(grad, Role.OUTPUT_GRAD, known, recipe, dims, key)
    multiply = functools.partial(
        product, precision=call.precision, backward=True, backend=call.backend
    )
    dlhs = multiply(
        forms.first,
        gathered(kept_rhs, call.gather),
        recipe.gemm("dgrad"),
        dims.dgrad,
        out_sharding=compat.permute_sharding(call.lhs.sharding, _inverse(dims.dgrad_to_lhs)),
    ).transpose(dims.dgrad_to_lhs)
    drhs = multiply(
        kept_lhs,
        forms.second,
        recipe.gemm("wgrad"),
        dims.wgrad,
        out_sharding=compat.permute_sharding(call.rhs.sharding, _inverse(dims.wgrad_to_rhs)),
    ).transpose(dims.wgrad_to_rhs)
    drhs = reduce_scatter(drhs, call.gather)
    if counts is not None:
        row = observe({Role.OUTPUT_GRAD: (grad, forms)}, recipe, known)
        counts = lax.concatenate((counts, row), 0)
    return dlhs.astype(call.lhs.dtype), drhs.astype(call.rhs.dtype), counts


def _with_scale(x: Operand, known: Known, role: Role, which: int) -> Operand:
    """An operand that was stripped by `without_scale`, with its scale in one of its GEMMs."""
    if not isinstance(x, ScaledArray) or x.scale is not None:
        return x
    assert isinstance(known, Scales)
    return dataclasses.replace(x, scale=known.scale[role][which])


_dot.defvjp(_fwd, _bwd)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
