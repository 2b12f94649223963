"""Scaling state of a call site whose caller knows an amax: the scale then needs no history."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowprec_jax.recipes import Role


def with_known_amax(
    state: Mapping[str, Any] | None, known: Mapping[Role, jax.Array | float]
) -> Mapping[str, Any] | None:
    """The state to give to an op, with these amaxes in place of the history.

    Only delayed scaling reads them; current scaling measures, and a state that is being calibrated
    has no history. What the op observes does not change.

    Args:
      state: scaling state of a call site, or None.
      known: the amax of an operand, or a bound of it, f32 [].
    """
    if state is None or "amax_history" not in state:
        return state
    history = state["amax_history"]
    for role, amax in known.items():
        history = history.at[..., int(role), :].set(jnp.asarray(amax, history.dtype))
    return {**state, "amax_history": history}
