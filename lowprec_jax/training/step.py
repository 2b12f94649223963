"""The training step: loss, gradients, guard, optimizer, advance. One compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lowprec_jax import state as scaling_of
from lowprec_jax.nnx import accumulate, calibrate
from lowprec_jax.sharding import (
    device_axes,
    fp8_all_reduce,
    init_reduction,
    local_copy,
    sum_over_devices,
)
from lowprec_jax.training.network import Network

Batch = tuple[jax.Array, jax.Array]
Tree = Any


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params: parameters, nested dicts.
      scaling: scaling state, nested dicts; no optimizer, norm or decay sees it.
      opt_state: state of the optimizer.
      reduction: state of the FP8 sum of gradients, see `fp8_all_reduce`; empty without.
      ema: average of the parameters over the steps, f32; empty without.
      step: completed steps, int32 [].
    """

    params: Any
    scaling: Any
    opt_state: Any
    reduction: Any
    ema: Any
    step: jax.Array

    @property
    def weights(self) -> Tree:
        """What is evaluated and sampled: the average of the parameters where there is one."""
        if not self.ema:
            return self.params
        return jax.tree.map(lambda mean, x: mean.astype(x.dtype), self.ema, self.params)


class StepMetrics(NamedTuple):
    """What a step reports; scalars on the device.

    Attributes:
      loss: mean next-token loss of the batch, nats.
      grad_norm: global norm of the gradients, before clipping.
      skipped: 1 if the update was skipped because the loss, a gradient or an operand of a quantized
        product was not finite.
      operands: see `lowprec_jax.state.operand_table`; None without quantized layers. The host sums
        it up, see `lowprec_jax.state.summarize`.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    operands: jax.Array | None


def init_state(
    network: Network,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    reduce: str = "float32",
    ema: bool = False,
) -> TrainState:
    """A fresh state on the devices of the network; its scales are not calibrated yet.

    Each device makes its own part: a model that does not fit one device never exists whole.

    Args:
      network: the network.
      tx: the optimizer.
      key: random key of the parameters.
      reduce: type in which gradients are summed over devices; "fp8" has state.
      ema: keep an average of the parameters.
    """
    return network.layout.init(_init(network, tx, reduce, ema), key)


def abstract_state(
    network: Network,
    tx: optax.GradientTransformation,
    *,
    reduce: str = "float32",
    ema: bool = False,
) -> TrainState:
    """The shapes, types and shardings of `init_state`, without making it."""
    state = jax.eval_shape(_init(network, tx, reduce, ema), jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        network.layout.shardings(state),
    )


def _init(
    network: Network, tx: optax.GradientTransformation, reduce: str, ema: bool
) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        params, scaling = network.init(key)
        reduction = init_reduction(params) if reduce == "fp8" else {}
        average = optax.tree.cast(params, jnp.float32) if ema else {}
        return TrainState(params, scaling, tx.init(params), reduction, average, jnp.int32(0))

    return init


def build_step(
    network: Network,
    tx: optax.GradientTransformationExtraArgs,
    like: TrainState,
    *,
    micro_batches: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The jitted training step ``(state, batch) -> (state, metrics)``; the state is donated.

    Args:
      network: the network.
      tx: the optimizer.
      like: a state such as it will be given, arrays or abstract.
      micro_batches: parts of the batch that run one after the other.
      ema_decay: decay of the average of the parameters, if the state has one.

    Returns:
      The step. Its batch is a pair of token ids int32 [batch, context], inputs and targets, put on
      the devices by ``network.layout.put_batch``.
    """
    layout = network.layout
    gradients = build_gradients(network, micro_batches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        others = (state.scaling, state.reduction)
        loss, grads, (scaling, reduction) = gradients(state.params, others, batch)
        grad_norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        # An infinite operand saturates in the cast, so that loss and gradients can be finite.
        finite = (
            jnp.isfinite(loss)
            & jnp.isfinite(grad_norm)
            & (scaling_of.nonfinite(state.scaling, scaling) == 0)
        )

        def update(grads: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
            with jax.numpy_dtype_promotion("standard"):  # Optax's Adam fails under the strict one
                updates, opt_state = tx.update(grads, opt_state, params)
            return layout.place(optax.apply_updates(params, updates)), opt_state

        kept = state.params, state.opt_state
        update = layout.automatic(update, like=kept)
        params, opt_state = jax.lax.cond(
            finite, lambda: update(grads, state.opt_state, state.params), lambda: kept
        )
        ema = _next_average(state.ema, params, ema_decay, state.step)
        metrics = StepMetrics(
            loss,
            grad_norm,
            (~finite).astype(jnp.int32),
            scaling_of.operand_table(scaling, network.recipes) if network.recipes else None,
        )
        return TrainState(params, scaling, opt_state, reduction, ema, state.step + 1), metrics

    return layout.compile(step, like)


def _next_average(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """The average with the parameters of a step in it.

    The decay is smaller in the first steps, so that the initial weights are soon forgotten.
    """
    if not ema:
        return ema
    done = step.astype(jnp.float32)
    weight = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda mean, x: mean + weight * (x.astype(mean.dtype) - mean), ema, params)


def build_calibration(
    network: Network, like: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, None]]:
    """The jitted calibration ``(state, batch) -> (state, None)``: scales for the first step."""
    layout = network.layout

    def observe(params: Tree, scaling: Tree, batch: Batch) -> Tree:
        model = network.merge(local_copy(params), scaling)
        calibrate(_loss(network, batch), model, *batch)
        return network.split(model)[1]

    observe = layout.spread(observe, gradients=False)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, None]:
        return state._replace(scaling=observe(state.params, state.scaling, batch)), None

    return layout.compile(step, like)


def build_gradients(network: Network, micro_batches: int = 1) -> Callable:
    """``(params, (scaling, reduction), batch) -> (loss, grads, (scaling, reduction))``.

    The mean loss of the whole batch, its gradients, and the next scaling and reduction state, with
    every observation advanced. For use inside a function compiled by ``network.layout``.
    """

    def gradients(params: Tree, others: Tree, batch: Batch):
        scaling, reduction = others
        model = network.merge(local_copy(params), scaling)
        value_and_grad = accumulate(
            _loss(network, batch), micro_batches, quantize_once=True, probes=True
        )
        loss, grads = value_and_grad(model, *batch)
        grads = nnx.to_pure_dict(grads)
        if reduction and device_axes():
            grads, reduction = fp8_all_reduce(grads, reduction, device_axes())
        else:
            grads = network.layout.reduce(grads)
        return sum_over_devices(loss), grads, (network.split(model)[1], reduction)

    return network.layout.spread(gradients)


def _loss(network: Network, batch: Batch) -> Callable[..., jax.Array]:
    """The loss of a part of the batch: a sum over it, divided by the tokens of the whole."""
    tokens = sum_over_devices((batch[1] >= 0).sum(dtype=jnp.float32))

    def loss(model: nnx.Module, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return network.loss(network.whole(model), inputs, targets) / tokens

    return loss
