"""The operands of a GEMM: quantized as its quantizers say, kept for the backward pass, observed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lowprec_jax import compat
from lowprec_jax.numerics import Quantizer, ScaledArray, compute_amax, reciprocal
from lowprec_jax.ops.dimensions import Dimensions
from lowprec_jax.ops.gather import Gather, all_gather
from lowprec_jax.recipes import Recipe, Role, history_scales

# One side of a GEMM: quantized, or as it is for a GEMM in high precision.
Operand = ScaledArray | jax.Array


class Scales(NamedTuple):
    """What delayed scaling knows: scales f32[*stack], and ``1 / scale``.

    By role, each in the first and the second GEMM that uses it.
    """

    scale: Sequence[Sequence[jax.Array]]
    reciprocal: Sequence[Sequence[jax.Array]]


# Current scaling knows the amaxes of tensors, f32 [].
Known = Mapping[Role, jax.Array] | Scales


class AxisGroups(Protocol):
    """Dimension numbers of the three GEMMs of an op."""

    @property
    def groups(self) -> Sequence[tuple[tuple[int, ...], tuple[int, ...]]]:
        """By `Role`: the axes that its first GEMM contracts, and those that its second does."""
        ...


class Forms(NamedTuple):
    """An operand as the first and the second GEMM of its role multiply it."""

    first: Operand
    second: Operand


def forms_of(
    x: jax.Array,
    role: Role,
    known: Known,
    recipe: Recipe,
    dims: AxisGroups,
    key: jax.Array | None = None,
    given: Operand | None = None,
) -> Forms:
    """An operand in the form of each GEMM that uses it; forms that are equal are made once.

    Args:
      x: the operand.
      role: its role.
      known: what scales are made of, see `known_of`.
      recipe: the recipe.
      dims: dimension numbers of the three GEMMs.
      key: PRNG key, for stochastic rounding.
      given: the first form, where it was made before.
    """
    first, second = recipe.quantizers_of(role)
    own, other = dims.groups[role]
    reused = second is not None and second.axes == "forward"
    layouts = (own, other), ((own, other) if reused else (other, own))
    make = functools.partial(_form, x, recipe=recipe, key=key, role=role)
    form = make(first, layouts[0], _known(known, role, 0)) if given is None else given
    if _same_form(x, first, layouts[0], second, layouts[1]):
        return Forms(form, form)
    return Forms(form, make(second, layouts[1], _known(known, role, 1)))


def _known(known: Known, role: Role, which: int) -> Mapping[str, jax.Array | None]:
    """What a quantizer takes: the amax of a tensor, or scale and reciprocal of one of its forms."""
    if isinstance(known, Scales):
        return {"scale": known.scale[role][which], "factor": known.reciprocal[role][which]}
    return {"tensor_amax": known.get(role)}


Layout = tuple[Sequence[int], Sequence[int]]


def _same_form(x, first: Quantizer | None, a: Layout, second: Quantizer | None, b: Layout) -> bool:
    if first is None or second is None:
        return first is second
    if dataclasses.replace(first, axes="own") != dataclasses.replace(second, axes="own"):
        return False
    return not first.hadamard and first.tile(x.shape, *a) == second.tile(x.shape, *b)


def _form(
    x, quantizer: Quantizer | None, layout: Layout, known, *, recipe: Recipe, key, role: Role
) -> Operand:
    if quantizer is None:
        return x
    contracted, free = layout
    rotated = quantizer.rotate(x, contracted)
    if rotated is not x and quantizer.needs_tensor_amax:
        known = {"tensor_amax": current_amax({Role.LHS: rotated}, recipe)[Role.LHS]}
    tile = quantizer.tile(rotated.shape, contracted, free)
    return quantizer(rotated, tile, **known, key=key, with_values=_needs_values(role, quantizer))


def _needs_values(role: Role, quantizer: Quantizer) -> bool:
    """Whether a matmul that upcasts an operand should take the rounded values, not the codes.

    A kernel is upcast from its codes again in the backward pass, once if XLA sees both. The codes
    of an input are made for the backward pass in any case; most are one conversion away from bf16.
    """
    converts = quantizer.per_tensor and quantizer.format.dtype == quantizer.format.native_dtype
    return role == Role.OUTPUT_GRAD or (role == Role.LHS and not converts)


def known_of(
    operands: Mapping[Role, jax.Array],
    recipe: Recipe,
    history: jax.Array | None,
    sharded: Gather | None = None,
) -> Known:
    """What scales are made of: those of the history under delayed scaling, else `current_amax`."""
    if history is None:
        return current_amax(operands, recipe, sharded)
    return _scales(history, recipe)


# Compiled by itself, so that sites of equal shapes are traced and lowered once. The backward pass
# computes it again from the history: a scan does not stack what it was given, and kernels that read
# a scale from a stack are slow on XLA:CPU.
@functools.partial(jax.jit, static_argnums=1)
def _scales(history: jax.Array, recipe: Recipe) -> Scales:
    # All of a site at once: a division is computed by itself, and read by all that need it.
    scales = history_scales(history, recipe)
    return Scales(_entries(scales), _entries(reciprocal(scales)))


def _entries(x: jax.Array) -> list[list[jax.Array]]:
    """The entries f32[*stack] of f32[*stack, 3, 2]."""
    last = x.ndim - 1
    rows = [lax.split(row, (1, 1), last) for row in lax.split(x, (1,) * len(Role), last - 1)]
    return [[lax.squeeze(entry, (last - 1, last)) for entry in row] for row in rows]


def current_amax(
    operands: Mapping[Role, jax.Array], recipe: Recipe, sharded: Gather | None = None
) -> Mapping[Role, jax.Array]:
    """The amax of operands as they are: current scaling.

    On devices that hold parts of an operand (inside `jax.shard_map` and `jax.pmap`) it is that of
    the whole, by one `pmax` for all operands, unless the recipe asks for ``amax_scope="local"``.
    The shards of a kernel have one scale in any case: their codes are multiplied together. Scales
    finer than the tensor are those of the part that a device holds.

    Args:
      operands: the operands, by role.
      recipe: the recipe.
      sharded: how the kernel is sharded.
    """
    amax = {
        role: compute_amax(x)
        for role, x in operands.items()
        if any(q is not None and q.needs_tensor_amax for q in recipe.quantizers_of(role))
    }
    axes = compat.reduction_axes(operands.values(), ())
    if axes and amax and recipe.amax_scope == "global":
        reduced = largest_amax(jnp.stack(list(amax.values())), axes)
        return {role: reduced[i] for i, role in enumerate(amax)}
    if sharded is not None and sharded.is_manual and Role.RHS in amax:
        amax[Role.RHS] = largest_amax(amax[Role.RHS], sharded.axes)
    return amax


def largest_amax(amax: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`lax.pmax` of amaxes; a NaN on one device makes it Inf on all.

    XLA:CPU's all-reduce (JAX 0.10.2) may lose a NaN, and with it that a device was broken.
    """
    return lax.pmax(jnp.where(jnp.isnan(amax), jnp.inf, amax), axes)


def keep(x: Operand, name: str) -> Operand:
    """What the backward pass keeps of an operand, under a name for remat policies.

    Args:
      x: the operand; its codes are kept as bytes.
      name: name for `jax.checkpoint_policies.save_only_these_names`.
    """
    x = as_bytes(x)
    if not isinstance(x, ScaledArray):
        return checkpoint_name(x, name)
    x = _map_data(lambda data: checkpoint_name(data, name), x)
    return x if x.per_tensor else dataclasses.replace(x, scale=checkpoint_name(x.scale, name))


def gathered(x: Operand, how: Gather | None) -> Operand:
    """The whole operand from a shard of it; codes travel as bytes."""
    if how is None:
        return x
    x = as_bytes(x)
    if not isinstance(x, ScaledArray):
        return all_gather(x, how)
    whole = _map_data(lambda data: all_gather(data, how), x)
    if not x.per_tensor and x.scale.shape[how.axis] > 1:
        whole = dataclasses.replace(whole, scale=all_gather(x.scale, how))
    return as_codes(whole)


def can_gather_codes(recipe: Recipe, dims: Dimensions, shape: tuple[int, ...], how: Gather) -> bool:
    """Whether shards of a kernel have the codes and scales that the whole has: no tile is cut.

    Args:
      recipe: the recipe.
      dims: dimension numbers of the three GEMMs.
      shape: shape of the shard.
      how: how the kernel is sharded.
    """
    own, other = dims.groups[Role.RHS]
    layouts = (own, other), (other, own)
    for quantizer, layout in zip(recipe.quantizers_of(Role.RHS), layouts, strict=True):
        if quantizer is None or quantizer.per_tensor:
            continue
        size = quantizer.tile(shape, *layout)[how.axis]
        if quantizer.hadamard or shape[how.axis] % size or size == shape[how.axis]:
            return False
    return True


def without_scale(x: Operand | None, quantizer: Quantizer | None) -> Operand | None:
    """What is kept or given where delayed scaling knows the scale; a rotated range it does not."""
    if not isinstance(x, ScaledArray) or quantizer is None or quantizer.hadamard:
        return x
    return dataclasses.replace(x, scale=None)


def as_bytes(x: Operand) -> Operand:
    """Codes alone, f8 ones seen as uint8; a high-precision operand is returned as it is."""
    if not isinstance(x, ScaledArray):
        return x
    if jnp.issubdtype(x.data.dtype, jnp.integer):
        return x.with_data(x.data)
    return _map_data(lambda data: lax.bitcast_convert_type(data, jnp.uint8), x)


def as_codes(x: Operand) -> Operand:
    """The inverse of `as_bytes`; a high-precision operand is returned as it is."""
    if not isinstance(x, ScaledArray) or x.data.dtype == x.format.dtype:
        return x
    dtype = x.format.dtype
    return _map_data(lambda data: lax.bitcast_convert_type(data, dtype), x)


def _map_data(f: Callable[[jax.Array], jax.Array], x: ScaledArray) -> ScaledArray:
    return x.with_data(f(x.data))
