"""Flax Linen: layers, injection, whole-model quantization, gradients for stock `TrainState`."""

from lowprec_jax.linen.cond import cond
from lowprec_jax.linen.dot_general import (
    OVERWRITE_WITH_GRADIENT,
    DotGeneral,
    EinsumOp,
    dot_general,
    dot_general_cls,
    einsum_cls,
)
from lowprec_jax.linen.grad import accumulate, calibrate, per_example, value_and_grad
from lowprec_jax.linen.modules import Dense, DenseGeneral, Einsum
from lowprec_jax.linen.moe import MoE, RaggedDot
from lowprec_jax.linen.plan import plan
from lowprec_jax.linen.quantized_model import Layer, Quantized, layers, quantize
from lowprec_jax.linen.scaling import advance, health, init_scaling

__all__ = [
    "OVERWRITE_WITH_GRADIENT",
    "Dense",
    "DenseGeneral",
    "DotGeneral",
    "Einsum",
    "EinsumOp",
    "Layer",
    "MoE",
    "Quantized",
    "RaggedDot",
    "accumulate",
    "advance",
    "calibrate",
    "cond",
    "dot_general",
    "dot_general_cls",
    "einsum_cls",
    "health",
    "init_scaling",
    "layers",
    "per_example",
    "plan",
    "quantize",
    "value_and_grad",
]
