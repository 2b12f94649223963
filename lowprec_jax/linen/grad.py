"""Gradients of Linen models whose layers keep scaling state, in the form `TrainState` takes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowprec_jax import state
from lowprec_jax.errors import UserError
from lowprec_jax.linen.dot_general import OVERWRITE_WITH_GRADIENT

Variables = Mapping[str, Any]


def value_and_grad(loss: Callable, has_aux: bool = False, *, advance: bool = True) -> Callable:
    """`jax.value_and_grad` for ``loss(variables, *args)`` with variables of a quantized model.

    The amax of an output gradient depends on how the loss is normalised: divide a *sum* by the
    global number of tokens before differentiating, rather than averaging a mean of each micro-batch
    or device afterwards.

    Args:
      loss: ``loss(variables, *args) -> value``, or ``(value, aux)`` with `has_aux`. `variables` has
        the collection ``params`` and, with a delayed recipe, the scaling state; batch statistics
        and the like are arguments (and aux results) of their own.
      has_aux: see `jax.value_and_grad`.
      advance: complete an optimizer step. If not, observations are collected as *pending* only:
        for `optax.MultiSteps` or a loop over micro-batches, whose end is
        ``variables = advance(variables, when=...)``.

    Returns:
      ``f(variables, *args) -> (value, grads)``. `grads` has the structure of `variables`: gradients
      of the parameters, and the *next* scaling state in place of the gradient of its collection.
      Stock ``TrainState.apply_gradients(grads=grads)`` stores it; it never enters the optimizer.
      Take norms and clip ``grads["params"]`` only: the rest is state, not gradients.

    Raises:
      UserError: (from ``f``) `variables` holds another collection, which `TrainState` would drop.
    """
    return accumulate(loss, 1, has_aux, advance=advance)


def accumulate(
    loss: Callable, micro_batches: int, has_aux: bool = False, *, advance: bool = True
) -> Callable:
    """`value_and_grad` over micro-batches: values and gradients are summed, amaxes maximised.

    Args:
      loss: as in `value_and_grad`. The sum over micro-batches must be the loss of the batch: divide
        by the number of tokens of the whole batch, not of the micro-batch.
      micro_batches: number of equal parts into which the leading axis of every leaf of `args` is
        split; they run one after the other.
      has_aux: see `value_and_grad`; with more than one micro-batch, aux has a leading axis.
      advance: see `value_and_grad`.

    Returns:
      As `value_and_grad`.
    """
    return _returning_state(
        state.accumulate(_with_state(loss), micro_batches, has_aux=has_aux), advance
    )


def per_example(loss: Callable, has_aux: bool = False, *, advance: bool = True) -> Callable:
    """`value_and_grad` of every example by itself; amaxes are maximised over the examples.

    Args:
      loss: as in `value_and_grad`, for one example: `args` arrive without their first axis.
      has_aux: see `value_and_grad`.
      advance: see `value_and_grad`.

    Returns:
      As `value_and_grad`; values, gradients and aux have a leading axis of examples. The next
      scaling state has none: reduce the gradients before they go to ``apply_gradients``.
    """
    return _returning_state(state.per_example(_with_state(loss), has_aux=has_aux), advance)


def calibrate(
    loss: Callable, variables: Variables, *args: Any, gradient: bool = True
) -> dict[str, Any]:
    """Observes one batch in high precision and advances, so that step 0 is as good as later ones.

    Args:
      loss: as in `value_and_grad` (aux is ignored), or any function of ``(variables, *args)`` if
        not `gradient`.
      variables: parameters and scaling state.
      *args: the batch.
      gradient: also run the backward pass, to observe output gradients.

    Returns:
      `variables` with the advanced state.
    """
    params, scaling = _split(variables)
    following = state.calibrate(_with_state(loss), params, scaling, *args, gradient=gradient)
    return _join(params, following, like=variables)


def _returning_state(run: Callable, advance: bool) -> Callable:
    """``run(params, scaling, *args)`` for variables, the next state among the gradients."""

    def wrapped(variables: Variables, *args: Any):
        params, scaling = _split(variables)
        (value, grads), following = run(params, scaling, *args)
        if advance:
            following = state.advance(following)
        return value, _join(grads, following, like=variables)

    return wrapped


def _with_state(loss: Callable) -> Callable:
    """`loss` as the functional front door takes it: parameters and state apart."""

    def wrapped(params: Variables, scaling: Any, *args: Any):
        return loss({**params, OVERWRITE_WITH_GRADIENT: scaling}, *args)

    return wrapped


def _split(variables: Variables) -> tuple[dict[str, Any], Any]:
    """What is differentiated, and the scaling state."""
    if OVERWRITE_WITH_GRADIENT not in variables:
        return dict(variables), {}
    others = sorted(set(variables) - {"params", OVERWRITE_WITH_GRADIENT})
    if others:
        raise UserError(
            f"variables holds the collection(s) {', '.join(others)} besides 'params' and scaling "
            "state; TrainState would drop them. Give them to the loss as an argument of their own "
            "and return the updated ones as aux (has_aux=True)."
        )
    params = {key: value for key, value in variables.items() if key != OVERWRITE_WITH_GRADIENT}
    return params, variables[OVERWRITE_WITH_GRADIENT]


def _join(params: dict[str, Any], scaling: Any, like: Variables) -> Any:
    """A tree of the structure of `like` (FrozenDicts included)."""
    joined = {**params, OVERWRITE_WITH_GRADIENT: scaling}
    if OVERWRITE_WITH_GRADIENT not in like:
        joined = params
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(joined))
