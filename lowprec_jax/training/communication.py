"""What the training step of a config communicates: the subcommand ``collectives``."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lowprec_jax.ops import collectives, format_collectives, stablehlo_collectives
from lowprec_jax.sharding import BATCH_AXES
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.network import build_network
from lowprec_jax.training.optimizer import build_optimizer
from lowprec_jax.training.step import build_step, init_state


def lower_step(config: TrainConfig, vocab_size: int = 256) -> jax.stages.Lowered:
    """Lowers the training step of a config for the devices of its mesh; nothing is allocated.

    Args:
      config: the run; neither its corpus nor its tokenizer is read.
      vocab_size: tokens of the tokenizer; 256 are those of "byte".

    Raises:
      UserError: see `build_network`.
    """
    network, tx = build_network(config, vocab_size), build_optimizer(config)
    layout = network.layout
    init = functools.partial(init_state, network, tx, reduce=config.mesh.reduce)
    state = jax.eval_shape(init, jax.random.key(config.seed))
    state = jax.tree.map(_on_devices, state, layout.shardings(state))
    ids = jax.ShapeDtypeStruct((config.batch_size, config.model.context), jnp.int32)
    ids = _on_devices(ids, NamedSharding(layout.mesh, P(BATCH_AXES)))
    step = build_step(network, tx, state, micro_batches=config.optim.accumulate)
    return step.lower(state, (ids, ids))


def communication_report(config: TrainConfig, vocab_size: int = 256) -> str:
    """The collectives of one training step, compiled and as written, as two tables.

    Args:
      config: the run.
      vocab_size: see `lower_step`.

    Raises:
      UserError: see `build_network`.
    """
    mesh = config.mesh
    lowered = lower_step(config, vocab_size)
    platform = jax.devices()[0].platform
    widened = "; XLA:CPU widens bf16 collectives to f32, f8 to f16" if platform == "cpu" else ""
    return "\n".join(
        [
            f"{config.name}: one training step, recipe {config.precision.recipe}, data {mesh.data}"
            f" x fsdp {mesh.fsdp} x tensor {mesh.tensor}, strategy {mesh.strategy}.",
            "",
            f"Compiled for {platform}: what is executed{widened}.",
            format_collectives(collectives(lowered.compile())),
            "",
            "StableHLO: what the program asks for, before XLA merges sums and, where axes are not "
            "manual, adds its own.",
            format_collectives(stablehlo_collectives(lowered)),
        ]
    )


def _on_devices(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
