"""NNX's `value_and_grad`, during which quantized layers observe."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from lowprec_jax import compat
from lowprec_jax.nnx.kernels import quantize_kernels
from lowprec_jax.nnx.micro_batches import kinds_of, sum_micro_batches
from lowprec_jax.nnx.probe_variables import ArgNums, attach_probes, split_probes, with_probes
from lowprec_jax.nnx.sites import Observer, iter_sites
from lowprec_jax.recipes import advance_state
from lowprec_jax.state import Health, add_observations
from lowprec_jax.state import health as health_of
from lowprec_jax.state.grad import explaining_refs
from lowprec_jax.state.probes import merge_copies


def value_and_grad(
    f: Callable,
    *,
    argnums: ArgNums = 0,
    has_aux: bool = False,
    advance: bool = True,
    quantize_once: bool = False,
    probes: bool = False,
) -> Callable:
    """`nnx.value_and_grad` that also lets quantized layers observe and advances their scales.

    Drop-in: the loop around it (`nnx.jit`, `nnx.Optimizer`, BatchNorm, Dropout, metrics) stays as
    it is. The models are those among the arguments.

    The amax of an output gradient depends on how the loss is normalised: divide a sum by the number
    of tokens of the *whole* batch.

    Args:
      f: as in `nnx.value_and_grad`.
      argnums: as there.
      has_aux: as there.
      advance: complete an optimizer step with each call. With `optax.MultiSteps`, or where several
        calls make one step, pass False and call `advance(model, when=...)` once per step.
      quantize_once: quantize the kernels of `nnx.Linear` and `nnx.LinearGeneral` layers that keep
        scaling state once, in front of `f`, for all micro-batches and under remat. For models whose
        kernels reach the matmul as they are stored, in the layer's ``dtype``: a wrapper that
        changes a kernel on its way, such as a weight norm, would go unseen. Not with current
        scaling of whole tensors, where each call reduces the amaxes of both operands at once.
      probes: let the layers of differentiated arguments observe into probes (`lowprec_jax.state`
        explains them) instead of refs: the same state from a smaller program, which is traced and
        compiled faster. For models of which each quantized layer runs once in `f`, and on the way
        to the gradient: of a layer that runs twice the amaxes would be added up.

    Returns:
      As `nnx.value_and_grad`. Scaling state of the models is updated in place.
    """
    return accumulate(
        f,
        1,
        argnums=argnums,
        has_aux=has_aux,
        advance=advance,
        quantize_once=quantize_once,
        probes=probes,
    )


def accumulate(
    f: Callable,
    micro_batches: int,
    *,
    argnums: ArgNums = 0,
    has_aux: bool = False,
    advance: bool = True,
    quantize_once: bool = False,
    probes: bool = False,
) -> Callable:
    """`value_and_grad` over micro-batches: values and gradients are summed, amaxes maximised.

    Args:
      f: as in `value_and_grad`; the sum over the micro-batches must be the loss of the batch.
      micro_batches: number of equal parts into which the arrays among the arguments (in lists and
        dicts too, but not in NNX objects) are split along their first axis; the parts run one after
        the other. Arguments without arrays, such as flags, are passed on.
      argnums: see `value_and_grad`.
      has_aux: see `value_and_grad`; with more than one micro-batch, aux has a leading axis.
      advance: see `value_and_grad`.
      quantize_once: see `value_and_grad`.
      probes: see `value_and_grad`; micro-batches have one each.

    Returns:
      As `value_and_grad`.
    """

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        args = _positional(f, args, kwargs)
        probed = attach_probes(args, argnums) if probes else {}
        try:
            observers = _observers(args, calibrating=False, quantize_once=quantize_once)
            grad = nnx.value_and_grad(
                _observed(f, observers),
                argnums=with_probes(argnums) if probed else argnums,
                has_aux=has_aux,
            )
            with explaining_refs():
                out, (grads, seen) = sum_micro_batches(
                    split_probes(grad, argnums, probed), micro_batches, argnums, has_aux
                )(*args)
        finally:
            for site in probed.values():
                site.detach_probe()
        paths = [path for path, _ in iter_sites(*args)]
        for path, observer in zip(paths, observers, strict=True):
            if path not in probed:
                seen[path] = observer.ref[...]
        _collect(args, [seen[path] for path in paths], advance=advance)
        return out, grads

    return wrapped


def per_example(
    f: Callable, *, argnums: ArgNums = 0, has_aux: bool = False, advance: bool = True
) -> Callable:
    """`value_and_grad` of every example by itself; amaxes are maximised over the examples.

    A `jax.vmap` around the whole call, where every example has sinks of its own. Nothing but the
    scaling state of the models changes (no BatchNorm statistics, no random keys: a Dropout has the
    same mask for every example).

    Args:
      f: as in `value_and_grad`, for one example: the arrays among the arguments (as told by
        `accumulate`) arrive without their first axis.
      argnums: see `value_and_grad`.
      has_aux: see `value_and_grad`.
      advance: see `value_and_grad`.

    Returns:
      As `value_and_grad`; values, gradients and aux have a leading axis of examples.
    """

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        args = _positional(f, args, kwargs)
        nodes, arrays, others = kinds_of(args)
        graphdef, variables = nnx.split(nodes)

        def one(variables, example):
            merged = {**nnx.merge(graphdef, variables), **example, **others}
            inner = [merged[i] for i in range(len(args))]
            observers = _observers(inner, calibrating=False)
            grad = nnx.value_and_grad(_observed(f, observers), argnums=argnums, has_aux=has_aux)
            return grad(*inner), [observer.ref[...] for observer in observers]

        with explaining_refs():
            out, seen = jax.vmap(one, in_axes=(None, 0))(variables, arrays)
        _collect(args, [merge_copies(x, x.ndim - 1) for x in seen], advance=advance)
        return out

    return wrapped


def advance(*models: nnx.Module, when: jax.Array | bool = True) -> None:
    """Completes an optimizer step: scaling state pushes what was observed, once, in place.

    Args:
      *models: modules that hold scaling state.
      when: whether a step was completed; with `optax.MultiSteps` its ``has_updated(opt_state)``.
    """
    for _, site in iter_sites(*models):
        site.set_scaling(advance_state(site.get_scaling(), when))


def calibrate(f: Callable, *args: Any, argnums: ArgNums = 0, **kwargs: Any) -> None:
    """Observes one batch in high precision and advances, so that step 0 is as good as later ones.

    Nothing but the scaling state of the models changes (no BatchNorm statistics, no random keys).

    Args:
      f: the loss, as given to `value_and_grad` (with or without aux).
      *args: its arguments, models among them.
      argnums: see `value_and_grad`.
      **kwargs: its keyword arguments.
    """
    arguments = _positional(f, args, kwargs)
    observers = _observers(arguments, calibrating=True)
    observed = _observed(f, observers)

    def scalar(*args):
        out = observed(*args)
        return out[0] if isinstance(out, tuple) else out

    with explaining_refs():
        nnx.grad(scalar, argnums=argnums)(*nnx.clone(list(arguments)))
    _collect(arguments, [observer.ref[...] for observer in observers], advance=True)


def scaling_state(*models: nnx.Module) -> dict[str, Any]:
    """Scaling state by path of the op, as `lowprec_jax.state` takes it.

    With more than one model, paths start with the number of the model.
    """
    return {path: site.get_scaling() for path, site in iter_sites(*models)}


def health(*models: nnx.Module) -> Health:
    """Saturation, underflow, non-finite values and scale age of the last step."""
    return health_of(scaling_state(*models))


def _positional(f: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """All arguments by position, as NNX's `value_and_grad` hands them on."""
    if not kwargs:
        return args
    bound = inspect.signature(f).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"value_and_grad: {', '.join(bound.kwargs)} can be given by keyword only; bind it with "
            "functools.partial, or make it an ordinary argument."
        )
    return bound.args


def _observers(
    args: Sequence[Any], *, calibrating: bool, quantize_once: bool = False
) -> list[Observer]:
    kernels = quantize_kernels(args) if quantize_once else {}

    def make_ref(site):
        if site.probe is not None:
            return None
        return jax.new_ref(compat.to_varying(site.new_observations(), compat.manual_axes()))

    return [
        Observer.of(path, make_ref(site), calibrating=calibrating, kernel=kernels.get(path))
        for path, site in iter_sites(*args)
    ]


def _observed(f: Callable, observers: Sequence[Observer]) -> Callable:
    """`f`, during which the sites among its arguments observe."""

    def wrapped(*args):
        with observing(args, observers):
            return f(*args)

    return wrapped


@contextlib.contextmanager
def observing(args: Sequence[Any], observers: Sequence[Observer]) -> Iterator[None]:
    """Connects the sites among `args` to observers, in the order of `iter_sites`."""
    found = [site for _, site in iter_sites(*args)]
    for site, observer in zip(found, observers, strict=True):
        site.start_observing(observer)
    try:
        yield
    finally:
        for site in found:
            site.stop_observing()


def _collect(args: Sequence[Any], seen: Sequence[jax.Array], *, advance: bool) -> None:
    """Merges one observation f32[layers of the stack, 3, 5] per site into its state."""
    found = [site for _, site in iter_sites(*args)]
    states = [site.get_scaling() for site in found]
    shaped = [x.reshape(state["pending"].shape) for x, state in zip(seen, states, strict=True)]
    for site, state in zip(found, add_observations(states, shaped), strict=True):
        site.set_scaling(advance_state(state) if advance else state)
