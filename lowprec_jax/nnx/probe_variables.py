"""Probes that are variables of a model, differentiated along with its parameters."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lowprec_jax import compat
from lowprec_jax.nnx.sites import Observation, Site, iter_sites
from lowprec_jax.ops import Probe

ArgNums = int | nnx.DiffState | Sequence[int | nnx.DiffState]


def numbers_of(argnums: ArgNums) -> list[int]:
    """Numbers of the arguments that are differentiated."""
    every = argnums if isinstance(argnums, Sequence) else (argnums,)
    return [arg.argnum if isinstance(arg, nnx.DiffState) else arg for arg in every]


def attach_probes(args: Sequence[Any], argnums: ArgNums) -> dict[str, Site]:
    """Gives every call site of the differentiated arguments a probe.

    Returns:
      The sites, by path as in `iter_sites`.
    """
    numbers = numbers_of(argnums)
    probed = {path: site for path, site in iter_sites(*args) if _number(path, args) in numbers}
    for site in probed.values():
        zeros = jnp.zeros_like(site.get_scaling()["pending"])
        site.attach_probe(Probe(compat.to_varying(zeros, compat.manual_axes())))
    return probed


def with_probes(argnums: ArgNums) -> ArgNums:
    """`argnums` for NNX, with the probes among what is differentiated."""

    def extended(arg: int | nnx.DiffState) -> nnx.DiffState:
        if isinstance(arg, nnx.DiffState):
            return nnx.DiffState(arg.argnum, nnx.Any(arg.filter, Observation))
        return nnx.DiffState(arg, nnx.Any(nnx.Param, Observation))

    return [extended(x) for x in argnums] if isinstance(argnums, Sequence) else extended(argnums)


def split_probes(grad: Callable, argnums: ArgNums, probed: Collection[str]) -> Callable:
    """``grad`` of `with_probes`, as ``(*args) -> (value, (grads, observations by path))``."""

    def wrapped(*args):
        value, grads = grad(*args)
        numbers = {_number(path, args) for path in probed}
        several = isinstance(argnums, Sequence)
        kept, seen = [], {}
        for number, state in zip(numbers_of(argnums), grads if several else [grads], strict=True):
            if number in numbers:
                probes, state = nnx.split_state(state, Observation, ...)
                first = [number] if len(args) > 1 else []
                for path, variable in nnx.to_flat_state(probes):
                    seen["/".join(map(str, [*first, *path[:-1]]))] = variable.get_value().value
            kept.append(state)
        return value, (tuple(kept) if several else kept[0], seen)

    return wrapped


def _number(path: str, args: Sequence[Any]) -> int:
    """Number of the argument that a path of `iter_sites` is in."""
    return int(path.split("/")[0]) if len(args) > 1 else 0
