"""What moves between JAX versions, in one place, through public names only.

Varying axes: inside `jax.shard_map` every value knows along which manual mesh axes it differs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def is_ref(x: Any) -> bool:
    """Whether a value is a mutable reference (`jax.new_ref`), concrete or traced."""
    return isinstance(x, jax.Ref)


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes along which `x` (an array or a ref) differs between devices."""
    aval = jax.typeof(x)
    # JAX 0.10 and newer; before that the axes are an attribute `vma` of their own.
    axis_type = getattr(aval, "manual_axis_type", None)
    return frozenset(axis_type.varying if axis_type is not None else getattr(aval, "vma", ()))


def to_varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Marks `x` as varying along `axes` too; its gradient is summed over them."""
    missing = tuple(sorted(frozenset(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def explicit_shardings(*arrays: jax.Array) -> tuple[NamedSharding | None, ...]:
    """The shardings of arrays that meet on a mesh with explicit axes; without one, None for each.

    An array that is not on the mesh yet counts as replicated.
    """
    found = [jax.typeof(x).sharding for x in arrays]
    meshes = [s.mesh for s in found if AxisType.Explicit in getattr(s.mesh, "axis_types", ())]
    if not meshes:
        return (None,) * len(arrays)
    return tuple(NamedSharding(meshes[0], PartitionSpec()) if s.mesh.empty else s for s in found)


def with_trailing_axes(x: jax.Array, count: int) -> NamedSharding | None:
    """On a mesh with explicit axes, the sharding of `x` with more axes, not split; else None."""
    (sharding,) = explicit_shardings(x)
    if sharding is None:
        return None
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec) + count)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def unshard(x: jax.Array, axis: int) -> jax.Array:
    """Under plain ``jit``: `x` with nothing of `axis` split, its other axes as they are.

    On a mesh with automatic axes this needs the mesh (`jax.set_mesh`); without one, and on one
    device, the compiler decides.
    """
    (sharding,) = explicit_shardings(x)
    if sharding is not None:
        spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
        spec[axis] = None
        return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = [None if d == axis else PartitionSpec.UNCONSTRAINED for d in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def permute_sharding(sharding: NamedSharding | None, axes: Sequence[int]) -> NamedSharding | None:
    """The sharding of an array whose axes are those of `sharding` in the order `axes`."""
    if sharding is None:
        return None
    spec = [*sharding.spec, *[None] * len(axes)]
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in axes)))


def manual_axes() -> tuple[str, ...]:
    """The mesh axes that are manual here: those of the enclosing `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(mesh.manual_axes)


def reduction_axes(seen: Iterable[jax.Array], like: Iterable[jax.Array]) -> tuple[str, ...]:
    """The manual axes to reduce `seen` over, so that it is as replicated as `like`.

    Derived from the axes along which the values vary. Where JAX does not track those (`jax.pmap`,
    `jax.shard_map` without its checks) they are all manual axes: `like` counts as replicated.
    """
    manual = manual_axes()
    if manual and not varying_axes(to_varying(jax.numpy.zeros(()), manual)):
        return manual
    varying = frozenset[str]().union(*map(varying_axes, seen))
    return tuple(sorted(varying - frozenset[str]().union(*map(varying_axes, like))))
