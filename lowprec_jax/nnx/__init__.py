"""Flax NNX adapter: layers, quantization of unmodified models, gradients that observe.

Two changed lines adopt delayed scaling in a documented NNX loop: ``lp.nnx.quantize(model,
"fp8_delayed")``, and ``lp.nnx.value_and_grad`` for ``nnx.value_and_grad``.
"""

from lowprec_jax.nnx.attention import DotProductAttention, MultiHeadAttention
from lowprec_jax.nnx.cond import cond
from lowprec_jax.nnx.conv import Conv, ConvGeneralDilated
from lowprec_jax.nnx.embed import Embed
from lowprec_jax.nnx.gather import gather_kernels
from lowprec_jax.nnx.grad import (
    accumulate,
    advance,
    calibrate,
    health,
    per_example,
    scaling_state,
    value_and_grad,
)
from lowprec_jax.nnx.layers import Einsum, Linear, LinearGeneral
from lowprec_jax.nnx.lora import Frozen, LoRALinear
from lowprec_jax.nnx.mlp import GatedMlp, SmoothDotGeneral
from lowprec_jax.nnx.moe import MoE, RaggedDot
from lowprec_jax.nnx.plan import plan
from lowprec_jax.nnx.probes import collect_probes, make_probes, probing
from lowprec_jax.nnx.quantize import layers, quantize
from lowprec_jax.nnx.sites import DotGeneral, EinsumOp, Scaling, iter_sites

__all__ = [
    "Conv",
    "ConvGeneralDilated",
    "DotGeneral",
    "DotProductAttention",
    "Einsum",
    "EinsumOp",
    "Embed",
    "Frozen",
    "GatedMlp",
    "Linear",
    "LinearGeneral",
    "LoRALinear",
    "MoE",
    "MultiHeadAttention",
    "RaggedDot",
    "Scaling",
    "SmoothDotGeneral",
    "accumulate",
    "advance",
    "calibrate",
    "collect_probes",
    "cond",
    "gather_kernels",
    "health",
    "iter_sites",
    "layers",
    "make_probes",
    "per_example",
    "plan",
    "probing",
    "quantize",
    "scaling_state",
    "value_and_grad",
]
