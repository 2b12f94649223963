"""NNX's `value_and_grad`, during which quantized layers observe."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowprec_jax import compat
from lowprec_jax.nnx.sites import Observer, iter_sites
from lowprec_jax.recipes import advance_state
from lowprec_jax.state import Health, add_observations
from lowprec_jax.state import health as health_of
from lowprec_jax.state.grad import split_micro_batches

ArgNums = int | nnx.DiffState | Sequence[int | nnx.DiffState]


def value_and_grad(
    f: Callable, *, argnums: ArgNums = 0, has_aux: bool = False, advance: bool = True
) -> Callable:
    """`nnx.value_and_grad` that also lets quantized layers observe and advances their scales.

    Drop-in: the loop around it (`nnx.jit`, `nnx.Optimizer`, BatchNorm, Dropout, metrics) stays as
    it is. The models are those among the positional arguments.

    The amax of an output gradient depends on how the loss is normalised: divide a sum by the number
    of tokens of the *whole* batch.

    Args:
      f: as in `nnx.value_and_grad`.
      argnums: as there.
      has_aux: as there.
      advance: complete an optimizer step with each call. With `optax.MultiSteps`, or where several
        calls make one step, pass False and call `advance(model, when=...)` once per step.

    Returns:
      As `nnx.value_and_grad`. Scaling state of the models is updated in place.
    """
    return accumulate(f, 1, argnums=argnums, has_aux=has_aux, advance=advance)


def accumulate(
    f: Callable,
    micro_batches: int,
    *,
    argnums: ArgNums = 0,
    has_aux: bool = False,
    advance: bool = True,
) -> Callable:
    """`value_and_grad` over micro-batches: values and gradients are summed, amaxes maximised.

    Args:
      f: as in `value_and_grad`; the sum over the micro-batches must be the loss of the batch.
      micro_batches: number of equal parts into which the arguments that are no NNX objects are
        split along their first axis; they run one after the other.
      argnums: see `value_and_grad`.
      has_aux: see `value_and_grad`; with more than one micro-batch, aux has a leading axis.
      advance: see `value_and_grad`.

    Returns:
      As `value_and_grad`.
    """

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        observers = _observers(args, calibrating=False)

        def observed(*args, **kwargs):
            with _observing(args, observers):
                return f(*args, **kwargs)

        grad = nnx.value_and_grad(observed, argnums=argnums, has_aux=has_aux)
        out = _sum_micro_batches(grad, micro_batches, has_aux)(*args, **kwargs)
        _collect(args, observers, advance=advance)
        return out

    return wrapped


def advance(*models: nnx.Module, when: jax.Array | bool = True) -> None:
    """Completes an optimizer step: scaling state pushes what was observed, once, in place.

    Args:
      *models: modules that hold scaling state.
      when: whether a step was completed; with `optax.MultiSteps` its ``has_updated(opt_state)``.
    """
    for _, site in iter_sites(*models):
        site.scaling.set_value(advance_state(site.scaling.get_value(), when))


def calibrate(f: Callable, *args: Any, argnums: ArgNums = 0, **kwargs: Any) -> None:
    """Observes one batch in high precision and advances, so that step 0 is as good as later ones.

    Nothing but the scaling state of the models changes (no BatchNorm statistics, no random keys).

    Args:
      f: the loss, as given to `value_and_grad` (with or without aux).
      *args: its arguments, models among them.
      argnums: see `value_and_grad`.
      **kwargs: its keyword arguments.
    """
    observers = _observers(args, calibrating=True)

    def observed(*args, **kwargs):
        with _observing(args, observers):
            out = f(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    nnx.grad(observed, argnums=argnums)(*nnx.clone(list(args)), **kwargs)
    _collect(args, observers, advance=True)


def scaling_state(*models: nnx.Module) -> dict[str, Any]:
    """Scaling state of models by path of the op, as `lowprec_jax.state` takes it."""
    return {path: dict(site.scaling.get_value()) for path, site in iter_sites(*models)}


def health(*models: nnx.Module) -> Health:
    """Saturation, underflow, non-finite values and scale age of the last step."""
    return health_of(scaling_state(*models))


def _observers(args: Sequence[Any], *, calibrating: bool) -> list[Observer]:
    def make_ref(zeros):
        return jax.new_ref(compat.to_varying(zeros, compat.manual_axes()))

    return [
        site.new_observer(calibrating=calibrating, make_ref=make_ref)
        for _, site in iter_sites(*args)
    ]


@contextlib.contextmanager
def _observing(args: Sequence[Any], observers: Sequence[Observer]) -> Iterator[None]:
    found = [site for _, site in iter_sites(*args)]
    for site, observer in zip(found, observers, strict=True):
        site.start_observing(observer)
    try:
        yield
    finally:
        for site in found:
            site.stop_observing()


def _collect(args: Sequence[Any], observers: Sequence[Observer], *, advance: bool) -> None:
    found = [site for _, site in iter_sites(*args)]
    states = [dict(site.scaling.get_value()) for site in found]
    seen = [
        observer.ref[...].reshape(state["pending"].shape)
        for observer, state in zip(observers, states, strict=True)
    ]
    for site, state in zip(found, add_observations(states, seen), strict=True):
        site.scaling.set_value(advance_state(state) if advance else state)


def _sum_micro_batches(grad: Callable, micro_batches: int, has_aux: bool) -> Callable:
    if micro_batches == 1:
        return grad

    def wrapped(*args, **kwargs):
        nodes = {i: x for i, x in enumerate(args) if isinstance(x, nnx.Pytree)}
        parts = {
            i: jax.tree.map(lambda leaf: split_micro_batches(leaf, micro_batches), x)
            for i, x in enumerate(args)
            if i not in nodes
        }

        def micro_batch(nodes, part):
            merged = {**nodes, **part}
            out, grads = grad(*(merged[i] for i in range(len(args))), **kwargs)
            value, aux = out if has_aux else (out, None)
            return value, grads, aux

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def rest(carry, part):
            nodes, total = carry
            value, grads, aux = micro_batch(nodes, part)
            return (nodes, jax.tree.map(jnp.add, total, (value, grads))), aux

        first = jax.tree.map(lambda x: x[0], parts)
        value, grads, aux = micro_batch(nodes, first)
        (_, (value, grads)), others = rest(
            (nodes, (value, grads)), jax.tree.map(lambda x: x[1:], parts)
        )
        if not has_aux:
            return value, grads
        aux = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), aux, others)
        return (value, aux), grads

    return wrapped
