"""Probes of NNX models, see `lowprec_jax.state.probes`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from lowprec_jax import state
from lowprec_jax.nnx.grad import observing, scaling_state
from lowprec_jax.nnx.sites import Observer, iter_sites
from lowprec_jax.state.probes import one_copy


def make_probes(model: nnx.Module, copies: int | Sequence[int] = ()) -> dict[str, Any]:
    """A probe for every call site with state, by path; see `lowprec_jax.state.make_probes`."""
    return state.make_probes(scaling_state(model), copies)


@contextlib.contextmanager
def probing(
    model: nnx.Module, probes: dict[str, Any], *, calibrating: bool = False
) -> Iterator[None]:
    """Lets the layers of a model observe into probes, inside a loss that is differentiated by both.

    Args:
      model: a model; inside `jax.shard_map` the one that entered the region as an argument (an NNX
        module is a pytree).
      probes: from `make_probes`: one copy, or the part of the copies that a device sees.
      calibrating: compute in high precision and only observe.
    """
    found = list(iter_sites(model))
    observers = [Observer.of(path, None, calibrating=calibrating) for path, _ in found]
    for path, site in found:
        site.attach_probe(one_copy(probes[path], len(site.stack) + 2))
    try:
        with observing((model,), observers):
            yield
    finally:
        for _, site in found:
            site.detach_probe()


def collect_probes(model: nnx.Module, seen: dict[str, Any], *, advance: bool = True) -> None:
    """Merges the gradients of probes into the scaling state of a model, in place.

    Args:
      model: the model.
      seen: gradients of the probes; see `lowprec_jax.state.collect_probes`.
      advance: complete an optimizer step.
    """
    tree = state.collect_probes(scaling_state(model), seen)
    tree = state.advance(tree) if advance else tree
    for path, site in iter_sites(model):
        site.set_scaling(tree[path])
