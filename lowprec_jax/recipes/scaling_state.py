"""Scaling state of one call site: its layout, and the amax that scales are computed from.

State is a plain dict of f32 arrays, so that every Flax and checkpoint tool can hold it. Each array
has one row per `Role`; leading axes (``stack``) hold the layers of a scanned stack:

``amax_history``  f32[*stack, 3, window]  newest first; delayed scaling only
``pending``       f32[*stack, 3, 5]       observed since the last advance, columns of `Column`
``observed``      f32[*stack, 3, 7]       the same of the last completed step, for reports, and the
                                        columns of `Record`; an amax that is not finite is 0 here,
                                        its elements are counted
``counter``       f32[*stack]             completed steps; stochastic rounding only, its random key
"""

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics import MIN_AMAX, scale_factor, scale_from_history, usable
from lowprec_jax.recipes.recipe import Recipe, Role

State = dict[str, jax.Array]


class Column(enum.IntEnum):
    """Columns of an observation: amaxes combine by max, counts by addition."""

    AMAX = 0
    SATURATED = 1
    UNDERFLOW = 2
    NONFINITE = 3
    SIZE = 4


class Record(enum.IntEnum):
    """Columns of ``observed`` after those of `Column`.

    AGE: steps since the scale moved.
    DROPPED: observations that were not usable, since the start.
    """

    AGE = 5
    DROPPED = 6


def init_state(recipe: Recipe, stack: tuple[int, ...] = ()) -> State:
    """State of a call site that has seen nothing; empty for a recipe without state.

    Args:
      recipe: the recipe.
      stack: leading axes, one entry per scanned or vmapped layer axis.
    """
    if not recipe.stateful:
        return {}
    rows = (*stack, len(Role))
    state = {
        "pending": jnp.zeros((*rows, len(Column)), jnp.float32),
        "observed": jnp.zeros((*rows, len(Column) + len(Record)), jnp.float32),
    }
    if recipe.delayed:
        state["amax_history"] = jnp.zeros((*rows, recipe.window), jnp.float32)
    if recipe.stochastic:
        state["counter"] = jnp.zeros(stack, jnp.float32)
    return state


# Compiled by itself, as all that each call site does: traced and lowered once.
@jax.jit
def merge_observations(a: jax.Array, b: jax.Array) -> jax.Array:
    """Combines two observations f32[..., 5]: the larger amax, the sum of the counts.

    Associative and commutative with zeros as identity: module reuse, scan, micro-batches and
    devices give the same state in any order.
    """
    (a_amax, a_counts), (b_amax, b_counts) = _split(a), _split(b)
    return lax.concatenate((lax.max(a_amax, b_amax), lax.add(a_counts, b_counts)), a.ndim - 1)


def amax_only(observation: jax.Array) -> jax.Array:
    """An observation f32[..., 5] without its counts."""
    amax, counts = _split(observation)
    return lax.concatenate((amax, lax.full_like(counts, 0)), observation.ndim - 1)


def _split(observation: jax.Array) -> Sequence[jax.Array]:
    """The amax f32[..., 1] and the counts f32[..., 4]."""
    return lax.split(observation, (1, len(Column) - 1), axis=observation.ndim - 1)


def advance_state(state: State, when: jax.Array | bool = True) -> State:
    """Completes an optimizer step of one call site: pushes what was observed, once.

    An operand that was not observed keeps its state. One whose amax is zero or not finite keeps
    its history (so its scale) and counts as dropped: one Inf never freezes a scale.

    Args:
      state: state of a call site, with or without leading axes.
      when: whether a step was completed (bool or bool []); if not, `state` is returned unchanged
        and goes on collecting. With `optax.MultiSteps`: its `has_updated`.

    Returns:
      The next state, of the same structure.
    """
    return _advance(state, None if when is True else jnp.asarray(when))


# Compiled by itself, so that sites of equal shapes are traced and lowered once.
@jax.jit
def _advance(state: State, when: jax.Array | None) -> State:
    pending, record = state["pending"], state["observed"]
    last = pending.ndim - 1
    amax, _, size = lax.split(pending, (1, len(Column) - 2, 1), axis=last)
    before, age, dropped = lax.split(record, (len(Column), 1, 1), axis=last)
    # An amax without a size comes from a layer whose backward pass did not run.
    done, pushed = lax.ne(amax + size, np.float32(0)), usable(amax)
    if when is not None:
        done, pushed = done & when, pushed & when
    zeros = lax.full_like(pending, 0)
    new = {"pending": zeros if when is None else _where(done, zeros, pending)}
    if "amax_history" in state:
        history = state["amax_history"]
        kept = lax.slice_in_dim(history, 0, history.shape[-1] - 1, axis=last)
        new["amax_history"] = _where(pushed, lax.concatenate((amax, kept), last), history)
        moved = lax.ne(_largest(new["amax_history"]), _largest(history))
    else:
        moved = lax.ne(amax, lax.slice_in_dim(before, Column.AMAX, Column.AMAX + 1, axis=last))
    observed = _where(lax.is_finite(pending), pending, zeros)  # what is kept, and saved, always is
    older = _where(moved, lax.full_like(age, 0), age + 1)
    following = _where(
        done, lax.concatenate((observed, older), last), lax.concatenate((before, age), last)
    )
    lost = lax.convert_element_type(done & ~pushed, jnp.float32)
    new["observed"] = lax.concatenate((following, dropped + lost), last)
    if "counter" in state:
        new["counter"] = state["counter"] + (1.0 if when is None else when.astype(jnp.float32))
    return new


def _where(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.where`, of which each is traced as a function."""
    return lax.select(jnp.broadcast_to(condition, a.shape), a, b)


def _largest(x: jax.Array) -> jax.Array:
    return lax.expand_dims(lax.reduce(x, np.float32(0), lax.max, (x.ndim - 1,)), (x.ndim - 1,))


def history_amax(state: State) -> jax.Array:
    """The amax f32[..., 3] that scales are computed from; 0 where nothing was seen yet."""
    return state["amax_history"].max(-1)


def history_scales(history: jax.Array, recipe: Recipe) -> jax.Array:
    """The scales f32[..., 3, 2] of each operand in the first and the second GEMM that uses it.

    They are `Recipe.scale` of `history_amax`; 1 where a quantizer takes no scale from an amax, and
    in high precision.

    Args:
      history: ``amax_history`` of a call site.
      recipe: its recipe, with delayed scaling.
    """
    quantizers = [recipe.quantizers_of(role) for role in Role]
    factors = [[scale_factor(q.format, q.margin) if q else 1 for q in both] for both in quantizers]
    powers = [[q is not None and q.scale == "power_of_two" for q in both] for both in quantizers]
    scales = scale_from_history(
        lax.expand_dims(history, (history.ndim - 1,)),
        np.array(factors, np.float32),
        np.array(powers),
    )
    measured = np.array([[bool(q and q.needs_tensor_amax) for q in both] for both in quantizers])
    return scales if measured.all() else jnp.where(measured, scales, 1.0)


def is_calibrated(state: State) -> jax.Array:
    """Whether every operand of a call site has a scale of its own, bool [...]."""
    return (history_amax(state) >= MIN_AMAX).all(-1)
