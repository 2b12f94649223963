"""The training step of our transformer with a peer's matmul in its layers.

Public name: `build_peer`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.peers.ops import PeerOp, peer_op
from lowprec_jax.models import Transformer, next_token_loss
from lowprec_jax.nnx.quantize import layers, op_attribute, stack_of
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.network import transformer_config
from lowprec_jax.training.optimizer import build_optimizer


class PeerState(nnx.Variable):
    """One array of a peer's scaling state."""


class PeerDotGeneral(nnx.Module):
    """A peer's matmul at the place of `jax.lax.dot_general` in an NNX layer.

    Args:
      op: the peer's.
      stack: leading axes of the stack of layers that this one is in.
    """

    def __init__(self, op: PeerOp, stack: tuple[int, ...]):
        self.apply = op.apply
        self.scaling = nnx.Dict(
            {
                name: PeerState(jnp.broadcast_to(value, (*stack, *value.shape)))
                for name, value in op.state.items()
            }
        )

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, **options):
        """Computes the product; options of `jax.lax.dot_general` are the peer's defaults."""
        state = {name: variable.get_value() for name, variable in self.scaling.items()}
        return self.apply(state, lhs, rhs, dimension_numbers)


def build_peer(config: TrainConfig, vocab_size: int, peer: str) -> tuple[Any, Any]:
    """A jitted step ``(state, batch) -> (state, loss)`` and its first state.

    Loss, gradients and optimizer are those of `lowprec_jax.training`; there is no finiteness
    guard, no health report and no calibration.

    Args:
      config: the run; its recipe is not read.
      vocab_size: tokens of the model.
      peer: one of `benchmarks.peers.linen.PEERS`.
    """
    tokens = config.batch_size * config.model.context
    sizes, op = transformer_config(config.model, vocab_size, tokens), peer_op(peer)
    model = Transformer(sizes, rngs=nnx.Rngs(config.seed))
    for path, layer in list(layers(model)):
        if path.startswith("blocks"):
            module = PeerDotGeneral(op, stack_of(layer))
            setattr(layer, op_attribute(layer), nnx.data(module))
    graphdef, params, scaling = nnx.split(model, nnx.Param, PeerState)
    tx = build_optimizer(config)

    def loss_of(trees, inputs, targets):
        logits = nnx.merge(graphdef, *trees)(inputs)
        return next_token_loss(logits, targets)[0] / tokens

    def step(state, batch):
        params, scaling, opt_state = state
        with jax.numpy_dtype_promotion("standard"):
            loss, (grads, scaling) = jax.value_and_grad(loss_of)((params, scaling), *batch)
            updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), scaling, opt_state), loss

    return jax.jit(step, donate_argnums=0), (params, scaling, tx.init(params))
