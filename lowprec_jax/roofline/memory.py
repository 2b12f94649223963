"""Bytes that a training step keeps on one chip, from abstract arrays; nothing is allocated.

Public names: `part_bytes`, `residuals`, `Residuals`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

__all__ = ["Residuals", "part_bytes", "residuals"]

Tree = Any


def part_bytes(tree: Tree) -> int:
    """Bytes of the part of abstract arrays that one device holds.

    Args:
      tree: `jax.ShapeDtypeStruct`, those with a sharding split as it says.
    """
    return sum(_part(x) for x in jax.tree.leaves(tree))


def _part(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * _itemsize(x.dtype)


def _itemsize(dtype: Any) -> int:
    # A random key is an extended type, which tells its size as well.
    return dtype.itemsize


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass, on one device with all parameters.

    Attributes:
      stream: bytes for each example of arrays with an axis of the width of the model.
      inner: bytes for each example of all others.
      fixed: bytes of what does not depend on the batch: codes of weights.
    """

    stream: float
    inner: float
    fixed: float

    def part(self, examples: float, tensor: int, weights: int, *, sequence: bool = False) -> float:
        """Bytes on one chip of a mesh.

        Args:
          examples: windows of a micro-batch on the chip.
          tensor: chips that share a matmul. They split the inside of attention and MLP; arrays of
            the width of the model stay whole, which is too many for the input of row-parallel
            layers.
          weights: chips that share the weights.
          sequence: the stream is split along the sequence too.
        """
        stream = self.stream / (tensor if sequence else 1)
        return examples * (stream + self.inner / tensor) + self.fixed / weights


def residuals(loss: Callable[..., jax.Array], params: Tree, batch_of: Callable, width: int):
    """Counts the arrays that `jax.vjp` of a loss keeps, by tracing it for one and two examples.

    Arguments of the function, such as parameters, are not counted: they are there anyway. XLA may
    recompute some of the rest, fuse it, or keep it in another type.

    Args:
      loss: ``(params, *batch) -> scalar``; with sinks it has to be traced without them.
      params: abstract parameters.
      batch_of: ``examples -> batch``, abstract.
      width: size of the residual stream.
    """
    one, two = (_kept(loss, params, batch_of(examples)) for examples in (1, 2))
    if len(one) != len(two):
        raise ValueError(
            f"The backward pass keeps {len(one)} arrays for one example and {len(two)} for two; "
            "what it keeps must not depend on the batch."
        )
    found = {"stream": 0.0, "inner": 0.0, "fixed": 0.0}
    for a, b in zip(one, two, strict=True):
        size, growth = _bytes(a), _bytes(b) - _bytes(a)
        found["stream" if width in a.shape else "inner"] += growth
        found["fixed"] += size - growth
    return Residuals(**found)


def _kept(loss: Callable, params: Tree, batch: tuple) -> list[Any]:
    def pullback(params, *batch):
        return jax.vjp(lambda p: loss(p, *batch), params)[1]

    jaxpr = jax.make_jaxpr(pullback)(params, *batch).jaxpr
    # Dicts keep the order; a literal is no array.
    kept = dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, Literal))
    return [v.aval for v in kept if v not in set(jaxpr.invars)]


def _bytes(aval: Any) -> int:
    return aval.size * _itemsize(aval.dtype)
