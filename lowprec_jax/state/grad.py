"""Gradients of functions whose layers keep scaling state: observe during the call, return the next.

The functional front door; `lowprec_jax.nnx` and `lowprec_jax.linen` have their own.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lowprec_jax.errors import UserError
from lowprec_jax.state.probes import merge_copies
from lowprec_jax.state.sites import Tree, add_observations, advance, collect, make_sinks, sites


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
        with explaining_refs():
            out = sum_micro_batches(grad, micro_batches, has_aux)(params, *args)
        return out, collect(state, live)

    return wrapped


def per_example(loss: Callable, *, has_aux: bool = False) -> Callable:
    """`value_and_grad` of every example by itself; amaxes are maximised over the examples.

    A `jax.vmap` around the whole call, where every example has sinks of its own. (JAX refuses a
    `jax.vmap` over examples *inside* a differentiated loss: they would share a sink.)

    Args:
      loss: as in `value_and_grad`, for one example: `args` arrive without their first axis.
      has_aux: see `value_and_grad`.

    Returns:
      As `value_and_grad`; values, gradients and aux have a leading axis of examples, state has not.
    """

    def wrapped(params: Any, state: Tree, *args: Any):
        def one(params: Any, *example: Any):
            live = make_sinks(state)
            grad = jax.value_and_grad(lambda p: loss(p, live, *example), has_aux=has_aux)
            return grad(params), [site["sink"][...] for _, site in sites(live)]

        with explaining_refs():
            out, seen = jax.vmap(one, in_axes=(None, *[0] * len(args)))(params, *args)
        return out, add_observations(state, [merge_copies(x, x.ndim - 1) for x in seen])

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
    with explaining_refs():
        if gradient:
            jax.grad(lambda p: _scalar(loss(p, live, *args)))(params)
        else:
            loss(params, live, *args)
    return advance(collect(state, live))


@contextlib.contextmanager
def explaining_refs() -> Iterator[None]:
    """Says what to do where JAX refuses the refs that layers observe into.

    Raises:
      UserError: a layer runs under `vmap` with a sink that is not mapped, or its sink is an
        argument of a `shard_map`, inside the differentiated function.
    """
    try:
        yield
    except KeyError as error:
        error.add_note(
            "If this names a variable of JAX, a layer with scaling state runs inside lax.cond, "
            "lax.switch, nn.cond or nnx.cond, which JAX cannot differentiate: use "
            "lowprec_jax.ops.cond, lowprec_jax.linen.cond or lowprec_jax.nnx.cond."
        )
        raise
    except Exception as error:
        reason = next((text for part, text in _REFUSALS.items() if part in str(error)), None)
        if reason is None:
            raise
        raise UserError(reason) from error


# Part of JAX's message -> what it means here. (JAX gives these errors no type of their own.)
_REFUSALS = {
    "unbatched array reference": (
        "A layer runs under vmap inside the differentiated loss, but its scaling state is not "
        "mapped; JAX refuses that. For a vmap over examples: pass the whole batch to the layer, "
        "take per-example gradients with per_example of lowprec_jax.state, .nnx or .linen, or use "
        "a recipe without state ('fp8_current'). For a vmap over experts: map the state with the "
        "parameters (jax.vmap: in_axes 0; Linen: variable_axes={'params': 0, "
        "lowprec_jax.linen.OVERWRITE_WITH_GRADIENT: 0} of nn.vmap; NNX: lowprec_jax.nnx.probing)."
    ),
    "can't unshard a ref": (
        "The sinks of layers are arguments of a shard_map inside the differentiated loss, where "
        "JAX takes no refs. Pass probes, which are arrays: lowprec_jax.state.make_probes(tree, "
        "copies=devices) with in_specs=P(axis), see lowprec_jax.state.probes."
    ),
}


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
