"""Flax Linen: layers, injection, whole-model quantization, gradients for stock `TrainState`."""

from lowprec_jax.linen.attention import DotProductAttention, MultiHeadAttention
from lowprec_jax.linen.cond import cond
from lowprec_jax.linen.conv import Conv, ConvGeneralDilated, conv_general_dilated_cls
from lowprec_jax.linen.dot_general import (
    OVERWRITE_WITH_GRADIENT,
    DotGeneral,
    EinsumOp,
    dot_general,
    dot_general_cls,
    einsum_cls,
)
from lowprec_jax.linen.embed import Embed
from lowprec_jax.linen.grad import accumulate, calibrate, per_example, value_and_grad
from lowprec_jax.linen.lora import FROZEN, LoRADense, lora_from_dense
from lowprec_jax.linen.mlp import GatedMlp, SmoothDotGeneral, smooth_dot_general_cls
from lowprec_jax.linen.modules import Dense, DenseGeneral, Einsum
from lowprec_jax.linen.moe import MoE, RaggedDot
from lowprec_jax.linen.plan import plan
from lowprec_jax.linen.quantized_model import Layer, Quantized, layers, quantize
from lowprec_jax.linen.scaling import advance, health, init_scaling

__all__ = [
    "FROZEN",
    "OVERWRITE_WITH_GRADIENT",
    "Conv",
    "ConvGeneralDilated",
    "Dense",
    "DenseGeneral",
    "DotGeneral",
    "DotProductAttention",
    "Einsum",
    "EinsumOp",
    "Embed",
    "GatedMlp",
    "Layer",
    "LoRADense",
    "MoE",
    "MultiHeadAttention",
    "Quantized",
    "RaggedDot",
    "SmoothDotGeneral",
    "accumulate",
    "advance",
    "calibrate",
    "cond",
    "conv_general_dilated_cls",
    "dot_general",
    "dot_general_cls",
    "einsum_cls",
    "health",
    "init_scaling",
    "layers",
    "lora_from_dense",
    "per_example",
    "plan",
    "quantize",
    "smooth_dot_general_cls",
    "value_and_grad",
]
