"""The optimizer of a run: AdamW with warm-up and cosine decay, FP32 masters where needed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowprec_jax.optim import master_weights
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.network import is_decayed


def build_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping and AdamW; with parameters below f32, on f32 masters."""
    optim = config.optim
    tx = optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=optim.b1,
            b2=optim.b2,
            weight_decay=optim.weight_decay,
            mask=_decayed,
        ),
    )
    if jnp.dtype(config.model.param_dtype).itemsize < 4:
        return master_weights(tx)
    return optax.with_extra_args_support(tx)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from zero to the peak, cosine decay to `final_fraction` of it."""
    optim = config.optim
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optim.learning_rate,
        warmup_steps=optim.warmup_steps,
        decay_steps=config.steps,
        end_value=optim.learning_rate * optim.final_fraction,
    )


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: is_decayed(jax.tree_util.keystr(path, simple=True, separator="/")), params
    )
