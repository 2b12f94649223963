"""What an op reads from the scaling state of its call site, and when it refuses to go on."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

from lowprec_jax.ops import sinks
from lowprec_jax.recipes import Recipe, Role


def read_state(
    recipe: Recipe, state: Mapping[str, Any] | None, op: str, stack: tuple[int, ...] = ()
) -> tuple[sinks.Sink | None, jax.Array | None]:
    """The sink or None, and what scales come from.

    That is the amax history f32[*stack, 3, window], or None where scales come from the operands.

    Args:
      recipe: the recipe.
      state: state of the call site.
      op: name of the op, for errors.
      stack: leading axes that the state of this op has.

    Raises:
      ValueError: delayed scaling without a state, or with one of another shape.
      TypeError: see `check_sink`.
    """
    state = state or {}
    sink = state.get("sink")
    if sink is not None:
        sinks.check_sink(sink)
    axes = f", {stack}" if stack else ""
    if recipe.delayed and "amax_history" in state:
        history = state["amax_history"]
        if history.shape[:-1] != (*stack, len(Role)):
            raise ValueError(
                f"{op}: amax_history is {history.shape}, but leading axes {stack} "
                f"are needed; make the state with init_state(recipe{axes})."
            )
        return sink, history
    if recipe.delayed and sink is None:
        raise ValueError(
            f"{op}: recipe {recipe.name!r} takes its scales from state, but the op got none. Pass "
            f"state=lowprec_jax.recipes.init_state(recipe{axes}), or the layer's state. "
            "'fp8_current' needs none."
        )
    return sink, None


def require_sink(recipe: Recipe, sink: sinks.Sink | None) -> None:
    """Refuses to differentiate delayed scaling that nobody observes.

    Raises:
      ValueError: there is no sink.
    """
    if sink is None and recipe.delayed:
        raise ValueError(
            f"A layer with recipe {recipe.name!r} is differentiated without a sink: its scales "
            "would never follow the data. Use value_and_grad of lowprec_jax.nnx, "
            "lowprec_jax.linen or lowprec_jax.state instead of JAX's or Flax's, or make_sinks in a "
            "loop of your own."
        )


# Step counter f32 [] and seed of a call site; see `lowprec_jax.ops.randomness.rounding_key`.
Rounding = tuple[jax.Array, jax.Array | int] | None


def read_rounding(recipe: Recipe, state: Mapping[str, Any] | None) -> Rounding:
    """What random keys are made of; None if gradients are not rounded stochastically."""
    if not recipe.stochastic or state is None or "counter" not in state:
        return None
    return lax.stop_gradient(state["counter"]).reshape(-1)[0], state.get("seed", 0)


def require_rounding(recipe: Recipe, rounding: Rounding) -> None:
    """Refuses to differentiate stochastic rounding without a counter.

    Raises:
      ValueError: there is no counter.
    """
    if recipe.stochastic and rounding is None:
        raise ValueError(
            f"Recipe {recipe.name!r} rounds gradients stochastically, from a step counter in its "
            "state, but the op got none. Pass state=lowprec_jax.recipes.init_state(recipe), or the "
            "layer's state."
        )
