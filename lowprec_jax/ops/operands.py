"""The operands of a GEMM: quantized as its formats need, kept for the backward pass, observed."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lowprec_jax import compat
from lowprec_jax.numerics import (
    Format,
    ScaledArray,
    compute_amax,
    quantize,
    range_statistics,
)
from lowprec_jax.ops.gather import Gather, all_gather
from lowprec_jax.recipes import Recipe, Role

# One side of a GEMM: quantized, or as it is for a GEMM in high precision.
Operand = ScaledArray | jax.Array
Forms = dict[Format | None, Operand]
# f32 [] by role: a dict, or the array f32[3].
Amax = Mapping[Role, jax.Array] | jax.Array


def forms_of(x: jax.Array, role: Role, amax: Amax, recipe: Recipe) -> Forms:
    """An operand in every form its GEMMs need: by format, and as it is under None.

    Args:
      x: the operand.
      role: its role.
      amax: f32 [], the amax that scales come from, by role.
      recipe: the recipe.
    """
    forms: Forms = {None: x}
    for fmt in recipe.formats_of(role):
        if fmt is not None and fmt not in forms:
            forms[fmt] = quantize(x, fmt, recipe.scale(amax[role], fmt))
    return forms


def current_amax(
    operands: Mapping[Role, jax.Array], recipe: Recipe, sharded: Gather | None = None
) -> Amax:
    """The amax of operands as they are: current scaling.

    On devices that hold parts of an operand (inside `jax.shard_map` and `jax.pmap`) it is that of
    the whole, by one `pmax` for all operands, unless the recipe asks for ``amax_scope="local"``.
    The shards of a kernel have one scale in any case: their codes are multiplied together.

    Args:
      operands: the operands, by role.
      recipe: the recipe.
      sharded: how the kernel is sharded.
    """
    amax = {
        role: compute_amax(x) for role, x in operands.items() if recipe.format_of(role) is not None
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


def keep(x: Operand, name: str, order: Iterable[int] | None = None) -> Operand:
    """What the backward pass keeps of an operand, under a name for remat policies.

    Args:
      x: the operand; its codes are kept as bytes.
      name: name for `jax.checkpoint_policies.save_only_these_names`.
      order: axis order to keep it in.
    """

    def kept(data: jax.Array) -> jax.Array:
        return checkpoint_name(data if order is None else data.transpose(tuple(order)), name)

    return _map_data(kept, as_bytes(x)) if isinstance(x, ScaledArray) else kept(x)


def gathered(x: Operand, how: Gather | None) -> Operand:
    """The whole operand from a shard of it; codes travel as bytes."""
    if how is None:
        return x
    if not isinstance(x, ScaledArray):
        return all_gather(x, how)
    return as_codes(_map_data(lambda data: all_gather(data, how), as_bytes(x)))


def as_bytes(x: ScaledArray) -> ScaledArray:
    """The same with its codes seen as uint8."""
    return _map_data(lambda data: lax.bitcast_convert_type(data, jnp.uint8), x)


def as_codes(x: Operand) -> Operand:
    """The inverse of `as_bytes`; a high-precision operand is returned as it is."""
    if not isinstance(x, ScaledArray):
        return x
    dtype = x.format.dtype
    return _map_data(lambda data: lax.bitcast_convert_type(data, dtype), x)


def observe(x: jax.Array, role: Role, forms: Mapping[Format | None, Operand], recipe: Recipe):
    """One row of an observation, f32[5]; only the amax and the size in high precision."""
    x, size = lax.stop_gradient(x), jnp.float32(x.size)
    quantized = forms[recipe.format_of(role)]
    if not isinstance(quantized, ScaledArray):
        zero = jnp.float32(0)
        return jnp.stack([compute_amax(x), zero, zero, zero, size])
    return jnp.stack([*range_statistics(x, quantized.scale, quantized.format), size])


def _map_data(f: Callable[[jax.Array], jax.Array], x: ScaledArray) -> ScaledArray:
    return dataclasses.replace(x, data=f(x.data))
