"""Scaling state of a model: sinks for one call, one advance per step. No Flax, no Optax."""

from lowprec_jax.ops import cond
from lowprec_jax.recipes import init_state
from lowprec_jax.state.grad import accumulate, calibrate, per_example, value_and_grad
from lowprec_jax.state.health import (
    Health,
    OperandColumn,
    health,
    nonfinite,
    operand_names,
    operand_table,
    summarize,
)
from lowprec_jax.state.probes import attach_probes, collect_probes, make_probes
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
    "OperandColumn",
    "accumulate",
    "add_observations",
    "advance",
    "attach_probes",
    "calibrate",
    "collect",
    "collect_probes",
    "cond",
    "health",
    "init_state",
    "is_site",
    "make_probes",
    "make_sinks",
    "map_sites",
    "nonfinite",
    "operand_names",
    "operand_table",
    "per_example",
    "sites",
    "summarize",
    "value_and_grad",
]
