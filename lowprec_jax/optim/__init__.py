"""Optimizer pieces for low-precision training; an adapter over Optax, without Flax."""

from lowprec_jax.optim.master_weights import (
    Assign,
    MasterWeightsState,
    master_weights,
    read_masters,
)

__all__ = ["Assign", "MasterWeightsState", "master_weights", "read_masters"]
