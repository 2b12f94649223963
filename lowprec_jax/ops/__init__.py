"""Quantized operations. Pure of Flax and Optax; they know scaling state only as a dict with a sink.

Differentiation rules live here and nowhere else.
"""

from lowprec_jax.ops.backends import BACKENDS, dot
from lowprec_jax.ops.cond import cond
from lowprec_jax.ops.dot_general import dot_general
from lowprec_jax.ops.einsum import einsum
from lowprec_jax.ops.program import GemmCount, count_gemms
from lowprec_jax.ops.sinks import IndexedSink, Probe, Sink

__all__ = [
    "BACKENDS",
    "GemmCount",
    "IndexedSink",
    "Probe",
    "Sink",
    "cond",
    "count_gemms",
    "dot",
    "dot_general",
    "einsum",
]
