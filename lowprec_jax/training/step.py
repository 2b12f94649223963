"""The training step: loss, gradients, guard, optimizer, advance. One compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from lowprec_jax import state as scaling_of
from lowprec_jax.models import next_token_loss
from lowprec_jax.nnx import accumulate, calibrate
from lowprec_jax.sharding import local_copy, over_data, sum_over_data
from lowprec_jax.training.network import Network

Batch = tuple[jax.Array, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params: parameters, nested dicts.
      scaling: scaling state, nested dicts; no optimizer, norm or decay sees it.
      opt_state: state of the optimizer.
      step: completed steps, int32 [].
    """

    params: Any
    scaling: Any
    opt_state: Any
    step: jax.Array


class StepMetrics(NamedTuple):
    """What a step reports; scalars on the device.

    Attributes:
      loss: mean next-token loss of the batch, nats.
      grad_norm: global norm of the gradients, before clipping.
      skipped: 1 if the update was skipped because loss or gradients were not finite.
      health: see `lowprec_jax.state.summarize`; None without quantized layers.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    health: scaling_of.Health | None


def init_state(network: Network, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state; its scales are not calibrated yet."""
    params, scaling = network.init(key)
    return TrainState(params, scaling, jax.jit(tx.init)(params), jnp.int32(0))


def build_step(
    network: Network,
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    micro_batches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The compiled training step ``(state, batch) -> (state, metrics)``; the state is donated.

    The batch is a pair of token ids int32 [batch, context]: inputs and targets.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        loss, grads, scaling = _gradients(network, state, batch, micro_batches)
        grad_norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update():
            with jax.numpy_dtype_promotion("standard"):  # Optax's Adam fails under the strict one
                updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state

        params, opt_state = jax.lax.cond(finite, update, lambda: (state.params, state.opt_state))
        metrics = StepMetrics(
            loss, grad_norm, (~finite).astype(jnp.int32), scaling_of.summarize(scaling)
        )
        return TrainState(params, scaling, opt_state, state.step + 1), metrics

    return jax.jit(over_data(step, mesh), donate_argnums=0)


def build_calibration(network: Network, mesh: Mesh) -> Callable[[TrainState, Batch], TrainState]:
    """The compiled calibration ``(state, batch) -> state``: scales for the first step."""

    def step(state: TrainState, batch: Batch) -> TrainState:
        model = network.merge(local_copy(state.params), state.scaling)
        calibrate(_loss(_global_tokens(batch)), model, *batch)
        return state._replace(scaling=network.split(model)[1])

    return jax.jit(over_data(step, mesh), donate_argnums=0)


def _gradients(network: Network, state: TrainState, batch: Batch, micro_batches: int):
    """Loss of the global batch, gradients of the parameters, next scaling state."""
    model = network.merge(local_copy(state.params), state.scaling)
    value_and_grad = accumulate(_loss(_global_tokens(batch)), micro_batches)
    loss, grads = value_and_grad(model, *batch)
    loss, grads = sum_over_data((loss, nnx.to_pure_dict(grads)))
    return loss, grads, network.split(model)[1]


def _loss(tokens: jax.Array) -> Callable[[nnx.Module, jax.Array, jax.Array], jax.Array]:
    """The loss of a part of the batch: a sum over it, divided by the tokens of the whole."""

    def loss(model: nnx.Module, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return next_token_loss(model(inputs_BT), targets_BT)[0] / tokens

    return loss


def _global_tokens(batch: Batch) -> jax.Array:
    return sum_over_data((batch[1] >= 0).sum(dtype=jnp.float32))
