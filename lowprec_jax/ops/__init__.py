"""Quantized operations. Pure of Flax and Optax; they know scaling state only as a dict with a sink.

Differentiation rules live here and nowhere else.
"""

from lowprec_jax.ops.accumulation import promoted, truncated
from lowprec_jax.ops.backends import BACKENDS, check_backend, dot, is_study, register_backend
from lowprec_jax.ops.collectives import (
    Collective,
    collectives,
    format_collectives,
    stablehlo_collectives,
)
from lowprec_jax.ops.cond import cond
from lowprec_jax.ops.conv import conv_general_dilated
from lowprec_jax.ops.dot_general import dot_general
from lowprec_jax.ops.einsum import einsum
from lowprec_jax.ops.gather import Gather, gather
from lowprec_jax.ops.program import GemmCount, count_gemms
from lowprec_jax.ops.ragged_dot import ragged_dot
from lowprec_jax.ops.rhs import quantize_rhs
from lowprec_jax.ops.sinks import IndexedSink, Probe, Sink
from lowprec_jax.ops.smoothing import channel_factors, fold_factors, smooth_dot_general

__all__ = [
    "BACKENDS",
    "Collective",
    "Gather",
    "GemmCount",
    "IndexedSink",
    "Probe",
    "Sink",
    "channel_factors",
    "check_backend",
    "collectives",
    "cond",
    "conv_general_dilated",
    "count_gemms",
    "dot",
    "dot_general",
    "einsum",
    "fold_factors",
    "format_collectives",
    "gather",
    "is_study",
    "promoted",
    "quantize_rhs",
    "ragged_dot",
    "register_backend",
    "smooth_dot_general",
    "stablehlo_collectives",
    "truncated",
]
