"""Scaling state of a model: sinks for one call, one advance per step. No Flax, no Optax."""

from lowprec_jax.ops import cond
from lowprec_jax.recipes import init_state
from lowprec_jax.state.grad import accumulate, calibrate, value_and_grad
from lowprec_jax.state.health import Health, health, operand_names, summarize
from lowprec_jax.state.sites import (
    add_observations,
    advance,
    collect,
    is_site,
    make_sinks,
    map_sites,
    sites,
)

__all__ = [
    "Health",
    "accumulate",
    "add_observations",
    "advance",
    "calibrate",
    "collect",
    "cond",
    "health",
    "init_state",
    "is_site",
    "make_sinks",
    "map_sites",
    "operand_names",
    "sites",
    "summarize",
    "value_and_grad",
]
