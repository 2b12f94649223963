"""Which mesh axes split which parameters: a table of path patterns per model."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lowprec_jax.errors import UserError

Tree = Any
Axes = str | tuple[str, ...] | None


class ShardingRule(NamedTuple):
    """How the parameters whose path matches are split.

    Attributes:
      path: regular expression, found anywhere in a path such as ``"blocks/mlp/down/kernel"``.
      axes: for each of the *trailing* dimensions the mesh axis or axes that split it, or None; the
        leading ones (layers of a scanned stack) stay whole.
    """

    path: str
    axes: tuple[Axes, ...]


def partition_specs(params: Tree, rules: Sequence[ShardingRule], mesh: Mesh) -> Tree:
    """The `PartitionSpec` of every parameter: that of the first rule that matches, else replicated.

    Mesh axes that the mesh has not, or has with size 1, split nothing: one table serves all meshes.

    Args:
      params: parameters, arrays or abstract.
      rules: the table.
      mesh: the devices.

    Raises:
      UserError: a rule uses a mesh axis twice, has more axes than a parameter has dimensions, or a
        dimension does not divide by the size of its mesh axis.
    """

    def spec(path, leaf) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for rule in rules:
            if re.search(rule.path, name):
                return _spec(name, leaf.shape, rule, mesh)
        return P()

    return jax.tree_util.tree_map_with_path(spec, params)


def split_axes(spec: P, dimension: int) -> tuple[str, ...]:
    """The mesh axes that split a dimension."""
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def dimension_over(spec: P, axis: str) -> int | None:
    """The dimension that a mesh axis splits, None if it splits none."""
    return next((d for d in range(len(spec)) if axis in split_axes(spec, d)), None)


def only(spec: P, axes: Sequence[str]) -> P:
    """The part of a spec that is over some mesh axes."""
    kept = (tuple(a for a in split_axes(spec, d) if a in axes) for d in range(len(spec)))
    return P(*(entry[0] if len(entry) == 1 else entry or None for entry in kept))


def split_further(spec: P, shape: Sequence[int], axis: str, mesh: Mesh) -> P:
    """A spec with the first dimension that divides split over one more mesh axis, if there is one.

    For the optimizer state of ZeRO-1: what is too small or odd stays as it is.
    """
    if mesh.shape[axis] == 1 or dimension_over(spec, axis) is not None:
        return spec
    for d, size in enumerate(shape):
        axes = (*split_axes(spec, d), axis)
        if size and size % math.prod(mesh.shape[a] for a in axes) == 0:
            entries = [*spec, *[None] * (len(shape) - len(spec))]
            entries[d] = axes[0] if len(axes) == 1 else axes
            return P(*entries)
    return spec


def _spec(name: str, shape: tuple[int, ...], rule: ShardingRule, mesh: Mesh) -> P:
    if len(rule.axes) > len(shape):
        raise UserError(
            f"Sharding rule {rule.path!r} names {len(rule.axes)} dimensions, but {name} has shape "
            f"{shape}. Give one entry for each of its last dimensions, or fewer."
        )
    entries: list[Axes] = [None] * (len(shape) - len(rule.axes))
    used: dict[str, int] = {}
    for d, axes in enumerate(rule.axes, start=len(entries)):
        names = (axes,) if isinstance(axes, str) else axes or ()
        live = tuple(a for a in names if mesh.shape.get(a, 1) > 1)
        for axis in names:
            if axis in used:
                raise UserError(
                    f"Sharding rule {rule.path!r} uses mesh axis {axis!r} for dimensions "
                    f"{used[axis]} and {d} of {name}; an axis can split one dimension."
                )
            used[axis] = d
        parts = math.prod(mesh.shape[a] for a in live)
        if shape[d] % parts:
            raise UserError(
                f"Dimension {d} of {name} has size {shape[d]}, which mesh axis "
                f"{' x '.join(map(repr, live))} of size {parts} does not divide. Choose a mesh "
                f"size that divides {shape[d]}, or another size of the model."
            )
        entries.append(live[0] if len(live) == 1 else live or None)
    return P(*entries) if any(entries) else P()
