"""Gradients of functions whose layers keep scaling state: observe during the call, return the next.

The functional front door; `lowprec_jax.nnx` and `lowprec_jax.linen` have their own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowprec_jax.errors import UserError
from lowprec_jax.state.sites import Tree, advance, collect, make_sinks


def value_and_grad(loss: Callable, *, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` that also lets layers observe.

    The amax of an output gradient depends on how the loss is normalised: divide a *sum* by the
    global number of tokens before differentiating, rather than averaging a mean of each micro-batch
    or device afterwards.

    Args:
      loss: ``loss(params, state, *args) -> value``, or ``(value, aux)`` with `has_aux`; `state` is
        the live scaling state whose entries it passes to the ops.
      has_aux: see `jax.value_and_grad`.

    Returns:
      ``f(params, state, *args) -> ((value, grads), state)``: gradients of the parameters only, and
      the state with what was observed *pending*. `advance` completes the optimizer step.
    """
    return accumulate(loss, 1, has_aux=has_aux)


def accumulate(loss: Callable, micro_batches: int, *, has_aux: bool = False) -> Callable:
    """`value_and_grad` over micro-batches: values and gradients are summed, amaxes maximised.

    Args:
      loss: as in `value_and_grad`. The sum over micro-batches must be the loss of the batch: divide
        by the number of tokens of the whole batch, not of the micro-batch.
      micro_batches: number of equal parts into which the leading axis of every leaf of `args` is
        split; they run one after the other.
      has_aux: see `value_and_grad`; with more than one micro-batch, aux has a leading axis.

    Returns:
      As `value_and_grad`.
    """

    def wrapped(params: Any, state: Tree, *args: Any):
        live = make_sinks(state)
        grad = jax.value_and_grad(lambda p, *xs: loss(p, live, *xs), has_aux=has_aux)
        out = sum_micro_batches(grad, micro_batches, has_aux)(params, *args)
        return out, collect(state, live)

    return wrapped


def sum_micro_batches(grad: Callable, micro_batches: int, has_aux: bool) -> Callable:
    """Runs ``grad(params, *args)`` on parts of `args` and adds values and gradients up."""
    if micro_batches == 1:
        return grad

    def wrapped(params: Any, *args: Any):
        parts = jax.tree.map(lambda x: split_micro_batches(x, micro_batches), args)
        first = jax.tree.map(lambda x: x[0], parts)
        value, grads = jax.eval_shape(grad, params, *first)
        total = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), (value[0] if has_aux else value, grads)
        )

        def body(total, part):
            out, grads = grad(params, *part)
            value, aux = out if has_aux else (out, None)
            return jax.tree.map(jnp.add, total, (value, grads)), aux

        (value, grads), aux = jax.lax.scan(body, total, parts)
        return ((value, aux) if has_aux else value), grads

    return wrapped


def calibrate(loss: Callable, params: Any, state: Tree, *args: Any, gradient: bool = True) -> Tree:
    """Observes one batch in high precision and advances, so that step 0 is as good as later ones.

    Args:
      loss: as in `value_and_grad`, or any function of ``(params, state, *args)`` if not `gradient`.
      params: parameters.
      state: scaling state; what it already knows stays in its histories.
      *args: the batch.
      gradient: also run the backward pass, to observe output gradients.

    Returns:
      The advanced state.
    """
    live = make_sinks(state, calibrating=True)
    if gradient:
        jax.grad(lambda p: _scalar(loss(p, live, *args)))(params)
    else:
        loss(params, live, *args)
    return advance(collect(state, live))


def _scalar(out: Any) -> jax.Array:
    return out[0] if isinstance(out, tuple) else out


def split_micro_batches(x: jax.Array, parts: int) -> jax.Array:
    """Splits the leading axis: [batch, ...] becomes [parts, batch / parts, ...]."""
    if x.ndim == 0 or x.shape[0] % parts:
        raise UserError(
            f"A batch of shape {x.shape} cannot be split into {parts} micro-batches along its "
            "first axis; choose a divisor of the batch size."
        )
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
