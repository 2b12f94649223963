"""Peers' quantized matmuls behind one signature, for code that is not a Linen model.

Public names: `PeerOp`, `peer_op`.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import fp8_ops
from jax import lax

from benchmarks.peers.linen import aqt_config, dot_general_cls, qwix_provider


class PeerOp(NamedTuple):
    """A matmul with scaling state.

    Attributes:
      state: of one layer that has seen nothing; empty without state. The gradient of it is the
        next state.
      apply: ``(state, lhs, rhs, dimension_numbers) -> product``.
    """

    state: dict[str, jax.Array]
    apply: Callable[..., jax.Array]


def peer_op(peer: str) -> PeerOp:
    """The op of one of `benchmarks.peers.linen.PEERS`."""
    if peer.startswith("flax"):
        return _flax(peer)
    if peer == "qwix fp8":
        return PeerOp({}, _qwix)
    # Made at every call: NNX takes no arrays in static attributes, and a config holds some.
    return PeerOp({}, lambda state, *operands: aqt_config(peer)(*operands))


def _flax(peer: str) -> PeerOp:
    collection = fp8_ops.OVERWRITE_WITH_GRADIENT

    def op() -> nn.Module:
        return dot_general_cls(peer)()

    def apply(state, lhs, rhs, dimension_numbers):
        return op().apply({collection: state}, lhs, rhs, dimension_numbers)

    def init():
        example = jnp.zeros((1, 1))
        return op().init(jax.random.key(0), example, example, (((1,), (0,)), ((), ())))

    variables = jax.jit(init)()
    return PeerOp(dict(variables[collection]), apply)


class _Product(nn.Module):
    """A product with a kernel; Qwix tells kernels from activations by their place in a model."""

    shape: tuple[int, ...]
    dimension_numbers: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.zeros, self.shape, x.dtype)
        return lax.dot_general(x, kernel, self.dimension_numbers)


def _qwix(state: dict, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> jax.Array:
    del state
    qwix = importlib.import_module("qwix")
    contracted, batch = dimension_numbers
    numbers = tuple(map(tuple, contracted)), tuple(map(tuple, batch))
    model = qwix.quantize_model(_Product(rhs.shape, numbers), qwix_provider())
    return model.apply({"params": {"kernel": rhs}}, lhs)
