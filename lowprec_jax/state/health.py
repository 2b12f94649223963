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
      worst: the operand with the largest saturated + underflow fraction; a name in the result of
        `health`, an index into `operand_names` in that of `summarize`.
    """

    saturated: float | jax.Array
    underflow: float | jax.Array
    nonfinite: float | jax.Array
    scale_age: float | jax.Array
    worst: str | jax.Array


class OperandColumn(enum.IntEnum):
    """Columns of `operand_table`.

    AMAX: largest magnitude; 0 if an element was not finite.
    SCALE: the scale; 0 where the operand is not quantized.
    SATURATED: fraction of elements that the cast clipped.
    UNDERFLOW: fraction of elements, not zero, that rounded to zero.
    NONFINITE: number of NaN and infinite elements.
    AGE: steps since the scale moved.
    """

    AMAX = 0
    SCALE = 1
    SATURATED = 2
    UNDERFLOW = 3
    NONFINITE = 4
    AGE = 5


def summarize(tree: Tree) -> Health | None:
    """Health as f32 scalars on the device, for use inside a compiled step; None without sites."""
    found = [site for _, site in sites(tree)]
    if not found:
        return None
    records = _records(found)
    saturated, underflow, size = (
        records[:, column] for column in (Column.SATURATED, Column.UNDERFLOW, Column.SIZE)
    )
    lost = (saturated + underflow) / jnp.maximum(size, 1)
    counts = saturated, underflow, _nonfinite(records), size
    (saturated, underflow, nonfinite, size), age = _totals(counts, records[:, Record.AGE])
    elements = jnp.maximum(size, 1)
    return Health(saturated / elements, underflow / elements, nonfinite, age, lost.argmax())


def operand_table(tree: Tree, recipes: Recipe | Mapping[str, Recipe]) -> jax.Array:
    """Health of every operand, for use inside a compiled step: a few fused operations.

    Args:
      tree: scaling state after `advance`.
      recipes: recipe of every call site by its path in `sites`, or the one of all of them. State
        holds amaxes; which scale they make is the recipe's affair.

    Returns:
      f32[n, 6]: rows as in `operand_names`, columns as in `OperandColumn`. The scale is the one in
      force: with delayed scaling that of the next step, with current scaling that of the step that
      was observed, in the first of the formats that the operand is quantized to.

    Raises:
      UserError: `recipes` lacks a call site.
    """
    found = sites(tree)
    if not found:
        return jnp.zeros((0, len(OperandColumn)), jnp.float32)
    states = [site for _, site in found]
    records = _records(states)
    size = jnp.maximum(records[:, Column.SIZE], 1)
    columns = {
        OperandColumn.AMAX: records[:, Column.AMAX],
        OperandColumn.SCALE: _scales(states, [_recipe(recipes, path) for path, _ in found]),
        OperandColumn.SATURATED: records[:, Column.SATURATED] / size,
        OperandColumn.UNDERFLOW: records[:, Column.UNDERFLOW] / size,
        OperandColumn.NONFINITE: _nonfinite(records),
        OperandColumn.AGE: records[:, Record.AGE],
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
    seen = jnp.where((was == now).all(-1), 0, _nonfinite(now))
    return _totals((seen,), seen)[0][0]


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
    summary = summarize(tree)
    if summary is None:
        return Health(0.0, 0.0, 0.0, 0.0, "")
    host = jax.device_get(summary)
    return Health(
        float(host.saturated),
        float(host.underflow),
        float(host.nonfinite),
        float(host.scale_age),
        operand_names(tree)[int(host.worst)],
    )


def _layers(site: Site) -> int:
    """Layers of the stack that a site is of."""
    return math.prod(site["pending"].shape[:-2])


def _records(states: Sequence[Site]) -> jax.Array:
    """``observed`` of every operand, f32[n, 7]."""
    columns = len(Column) + len(Record)
    return jnp.concatenate([state["observed"].reshape(-1, columns) for state in states])


def _nonfinite(records: jax.Array) -> jax.Array:
    """Non-finite elements of every operand, f32[n].

    A layer whose backward pass did not run has an amax without counts. If it is not finite, it is
    dropped and 0 in the record; then there is one at least.
    """
    no_count = (records[:, Column.SIZE] == 0) & (records[:, Column.AMAX] == 0)
    broken = no_count & (records[:, Record.DROPPED] > 0)
    return jnp.maximum(records[:, Column.NONFINITE], broken.astype(jnp.float32))


def _totals(
    counts: Sequence[jax.Array], ages: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The sum of every f32[n] of `counts`, and the largest of `ages`.

    One reduction of several arrays is one kernel. XLA:CPU splits that of a single array by call
    site, and those of 32 rows or more into windows; to compile them took longer than `advance`.
    """

    def combine(a, b):
        return *(x + y for x, y in zip(a[:-1], b[:-1], strict=True)), lax.max(a[-1], b[-1])

    # Ages are not negative: 0 is neutral for their maximum too.
    zeros = (np.float32(0),) * (len(counts) + 1)
    *sums, oldest = lax.reduce((*counts, ages), zeros, combine, (0,))
    return tuple(sums), oldest


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
