"""What the observations say: saturation, underflow, non-finite values, scales and their age."""

import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.errors import UserError
from lowprec_jax.recipes import Column, Recipe, Record, Role
from lowprec_jax.state.sites import Tree, sites

Site = Mapping[str, jax.Array]


class Health(NamedTuple):
    """Health of the last completed step over all call sites and operands.

    Attributes:
      saturated: fraction of elements that the cast clipped.
      underflow: fraction of elements, not zero, that rounded to zero.
      nonfinite: number of NaN and infinite elements.
      scale_age: steps since the scale moved, the largest of any operand that was observed.
      worst: name of the operand with the largest saturated + underflow fraction.
    """

    saturated: float
    underflow: float
    nonfinite: float
    scale_age: float
    worst: str


class OperandColumn(enum.IntEnum):
    """Columns of `operand_table`.

    AMAX: largest magnitude; 0 if an element was not finite.
    SCALE: the scale; 0 where the operand is not quantized.
    SATURATED: fraction of elements that the cast clipped.
    UNDERFLOW: fraction of elements, not zero, that rounded to zero.
    NONFINITE: number of NaN and infinite elements.
    AGE: steps since the scale moved.
    SIZE: number of elements that were observed.
    """

    AMAX = 0
    SCALE = 1
    SATURATED = 2
    UNDERFLOW = 3
    NONFINITE = 4
    AGE = 5
    SIZE = 6


def summarize(table: np.ndarray, names: Sequence[str]) -> Health:
    """Health of a model from an `operand_table` on the host.

    Args:
      table: f32[n, 7].
      names: `operand_names` of the model.

    Raises:
      ValueError: more or fewer names than rows.
    """
    if len(names) != len(table):
        raise ValueError(f"summarize: {len(names)} names for {len(table)} operands.")
    if not names:
        return Health(0.0, 0.0, 0.0, 0.0, "")
    lost = table[:, OperandColumn.SATURATED] + table[:, OperandColumn.UNDERFLOW]
    columns = table.astype(np.float64).T
    size = columns[OperandColumn.SIZE]
    elements = max(size.sum(), 1.0)
    return Health(
        float(columns[OperandColumn.SATURATED] @ size / elements),
        float(columns[OperandColumn.UNDERFLOW] @ size / elements),
        float(columns[OperandColumn.NONFINITE].sum()),
        float(columns[OperandColumn.AGE].max()),
        names[int(lost.argmax())],
    )


def operand_table(tree: Tree, recipes: Recipe | Mapping[str, Recipe]) -> jax.Array:
    """Health of every operand, for use inside a compiled step: a few fused operations.

    Args:
      tree: scaling state after `advance`.
      recipes: recipe of every call site by its path in `sites`, or the one of all of them. State
        holds amaxes; which scale they make is the recipe's affair.

    Returns:
      f32[n, 7]: rows as in `operand_names`, columns as in `OperandColumn`. The scale is the one in
      force: with delayed scaling that of the next step, with current scaling that of the step that
      was observed, in the first of the formats that the operand is quantized to.

    Raises:
      UserError: `recipes` lacks a call site.
    """
    found = sites(tree)
    if not found:
        return jnp.zeros((0, len(OperandColumn)), jnp.float32)
    states = [site for _, site in found]
    return _table(states, _scales(states, [_recipe(recipes, path) for path, _ in found]))


def _table(states: Sequence[Site], scale: jax.Array | None) -> jax.Array:
    found = _columns(_records(states))
    elements = lax.max(found[Column.SIZE], np.float32(1))
    columns = {
        OperandColumn.AMAX: found[Column.AMAX],
        OperandColumn.SCALE: jnp.zeros_like(elements) if scale is None else scale,
        OperandColumn.SATURATED: found[Column.SATURATED] / elements,
        OperandColumn.UNDERFLOW: found[Column.UNDERFLOW] / elements,
        OperandColumn.NONFINITE: _nonfinite(found),
        OperandColumn.AGE: found[Record.AGE],
        OperandColumn.SIZE: found[Column.SIZE],
    }
    return jnp.stack([columns[column] for column in OperandColumn], axis=-1)


def nonfinite(before: Tree, after: Tree) -> jax.Array:
    """Number of NaN and infinite elements that one step observed, f32 [].

    For a guard on the device: an Inf saturates in the cast, so that loss and gradients of a broken
    step can be finite. `Health.nonfinite` will not do: a layer that did not run, such as an expert
    without tokens, still reports what it saw when it last ran.

    Args:
      before: scaling state as the step was given it.
      after: the same after `advance`.
    """
    old, new = ([site for _, site in sites(tree)] for tree in (before, after))
    if not new:
        return jnp.float32(0)
    was, now = _records(old), _records(new)
    counts = _nonfinite(_columns(now))
    ran = lax.reduce(lax.ne(was, now), np.bool_(False), lax.bitwise_or, (1,))
    # Two results are one kernel; a reduction to a single one XLA:CPU splits into three.
    any_ran, total = lax.reduce(
        (ran, lax.select(ran, counts, lax.full_like(counts, 0))),
        (np.bool_(False), np.float32(0)),
        lambda a, b: (lax.bitwise_or(a[0], b[0]), lax.add(a[1], b[1])),
        (0,),
    )
    return lax.select(any_ran, total, np.float32(0))


def operand_names(tree: Tree) -> list[str]:
    """Names such as ``"blocks/mlp/down[2] output_grad"``, in the order of `operand_table`."""
    names = []
    for path, site in sites(tree):
        layers = _layers(site)
        where = [path] if layers == 1 else [f"{path}[{layer}]" for layer in range(layers)]
        names += [f"{place} {role.name.lower()}" for place in where for role in Role]
    return names


def health(tree: Tree) -> Health:
    """Health of a model's scaling state as numbers; waits for the device.

    Args:
      tree: scaling state after `advance`.
    """
    states = [site for _, site in sites(tree)]
    if not states:
        return Health(0.0, 0.0, 0.0, 0.0, "")
    return summarize(jax.device_get(_table(states, None)), operand_names(tree))


def _layers(site: Site) -> int:
    """Layers of the stack that a site is of."""
    return math.prod(site["pending"].shape[:-2])


def _records(states: Sequence[Site]) -> jax.Array:
    """``observed`` of every operand, f32[n, 7]."""
    columns = len(Column) + len(Record)
    return jnp.concatenate([state["observed"].reshape(-1, columns) for state in states])


def _columns(records: jax.Array) -> Sequence[jax.Array]:
    """f32[n] of each of `Column` and `Record`."""
    columns = lax.split(records, (1,) * records.shape[1], axis=1)
    return [lax.squeeze(column, (1,)) for column in columns]


def _nonfinite(columns: Sequence[jax.Array]) -> jax.Array:
    """Non-finite elements of every operand, f32[n].

    A layer whose backward pass did not run has an amax without counts. If it is not finite, it is
    dropped and 0 in the record; then there is one at least.
    """
    seen = columns[Column.SIZE] + columns[Column.AMAX]  # neither is negative
    broken = lax.eq(seen, np.float32(0)) & lax.gt(columns[Record.DROPPED], np.float32(0))
    return lax.max(columns[Column.NONFINITE], lax.convert_element_type(broken, jnp.float32))


def _recipe(recipes: Recipe | Mapping[str, Recipe], path: str) -> Recipe:
    if isinstance(recipes, Recipe):
        return recipes
    if path not in recipes:
        raise UserError(
            f"operand_table: no recipe for {path!r}; known: {', '.join(recipes) or 'none'}. Give "
            "one for every path of lowprec_jax.state.sites, or a single one for all."
        )
    return recipes[path]


def _scales(states: Sequence[Site], recipes: Sequence[Recipe]) -> jax.Array:
    """The scale of every operand, f32[n]; each distinct recipe is computed once, on all rows."""
    amax = _scaled_amax(states)
    layers = [_layers(state) for state in states]
    scale = jnp.zeros_like(amax)
    for recipe in dict.fromkeys(recipes):
        own = np.repeat([other == recipe for other in recipes], layers)
        columns = [recipe.scale(role, amax[:, role]) for role in Role]
        scale = jnp.where(own[:, None], jnp.stack(columns, axis=-1), scale)
    return scale.reshape(-1)


def _scaled_amax(states: Sequence[Site]) -> jax.Array:
    """The amaxes that the scales in force come from, f32[layers of all sites, 3]."""
    known = [s.get("amax_history", s["observed"][..., : Column.AMAX + 1]) for s in states]
    window = max(x.shape[-1] for x in known)
    rows = [x.reshape(-1, len(Role), x.shape[-1]) for x in known]
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, window - x.shape[-1]))) for x in rows]
    return jnp.concatenate(padded).max(-1)
