"""Micro-batches of arguments among which there are NNX objects."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowprec_jax.errors import UserError
from lowprec_jax.nnx.probe_variables import ArgNums, numbers_of
from lowprec_jax.recipes import merge_observations
from lowprec_jax.state.grad import split_micro_batches

ArrayLike = jax.Array | np.ndarray


def sum_micro_batches(
    grad: Callable, micro_batches: int, argnums: ArgNums, has_aux: bool
) -> Callable:
    """``grad(*args) -> (value, (grads, observations by path))`` on parts of `args`, combined."""
    if micro_batches == 1:
        return grad

    def wrapped(*args):
        nodes, arrays, others = kinds_of(args)
        _check_not_split(argnums, arrays)
        parts = jax.tree.map(lambda leaf: split_micro_batches(leaf, micro_batches), arrays)

        def micro_batch(nodes, part):
            merged = {**nodes, **part, **others}
            out, grads = grad(*(merged[i] for i in range(len(args))))
            value, aux = out if has_aux else (out, None)
            return value, grads, aux

        def add(a, b):
            (value, (grads, seen)), (other_value, (other_grads, other_seen)) = a, b
            value, grads = jax.tree.map(jnp.add, (value, grads), (other_value, other_grads))
            return value, (grads, jax.tree.map(merge_observations, seen, other_seen))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def rest(carry, part):
            nodes, total = carry
            value, grads, aux = micro_batch(nodes, part)
            return (nodes, add(total, (value, grads))), aux

        first = jax.tree.map(lambda x: x[0], parts)
        value, grads, aux = micro_batch(nodes, first)
        (_, (value, grads)), more = rest(
            (nodes, (value, grads)), jax.tree.map(lambda x: x[1:], parts)
        )
        if not has_aux:
            return value, grads
        aux = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), aux, more)
        return (value, aux), grads

    return wrapped


def kinds_of(args: Sequence[Any]) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    """Arguments by number: NNX objects (models), arrays (the batch), all others (flags)."""
    nodes = {i: x for i, x in enumerate(args) if _holds(x, nnx.Pytree | nnx.Variable)}
    arrays = {i: x for i, x in enumerate(args) if i not in nodes and _holds(x, ArrayLike)}
    others = {i: x for i, x in enumerate(args) if i not in nodes and i not in arrays}
    return nodes, arrays, others


def _holds(x: Any, kind: Any) -> bool:
    return any(isinstance(value, kind) for _, value in nnx.iter_graph(x))


def _check_not_split(argnums: ArgNums, arrays: dict[int, Any]) -> None:
    for number in numbers_of(argnums):
        if number in arrays:
            raise UserError(
                f"accumulate: argument {number} is differentiated, but holds arrays outside NNX "
                "objects, which are split into micro-batches. Put what is trained into an "
                "nnx.Module, or use value_and_grad."
            )
