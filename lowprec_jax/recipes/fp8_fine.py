"""FP8 with scales finer than the tensor: rows and channels, and DeepSeek's blocks.

An outlier costs its own row or block resolution, not the whole tensor. Every GEMM quantizes its
operands along its own contraction, from the tensor in high precision; only square tiles are the
same for the forward and the backward GEMM.

Source: float8 recipes, pytorch/ao, torchao/float8/config.py, for rows; DeepSeek-V3,
  arXiv:2412.19437, section 3.3, and Float8BlockScaling, NVIDIA/TransformerEngine,
  common/recipe/__init__.py, for blocks.
"""

import dataclasses

from lowprec_jax.numerics import E4M3FN, E5M2, Quantizer
from lowprec_jax.recipes.recipe import Gemm, Recipe
from lowprec_jax.recipes.registry import register_recipe

_ROW = Quantizer(E4M3FN, free=1)
_BLOCK = Quantizer(E4M3FN, contract=128, free=1)
_TILE = Quantizer(E4M3FN, contract=128, free=128)

# e4m3fn for gradients too: with a scale for each row their range fits, and one bit more helps.
FP8_ROWWISE = register_recipe(
    Recipe(
        name="fp8_rowwise",
        fwd=Gemm(_ROW, _ROW),
        dgrad=Gemm(_ROW, _ROW),
        wgrad=Gemm(_ROW, _ROW),
    )
)

# Weight gradients sum over all tokens: the GEMM that suffers most from rounding, left high.
FP8_ROWWISE_HP_WGRAD = register_recipe(
    dataclasses.replace(FP8_ROWWISE, name="fp8_rowwise_hp_wgrad", wgrad=None)
)

# Weights in 128 x 128 tiles, activations and gradients in 1 x 128. Scales are f32 numbers;
# scale_rounding="power_of_two" is Transformer Engine's default and DeepSeek's for some activations.
FP8_BLOCK = register_recipe(
    Recipe(
        name="fp8_block",
        fwd=Gemm(_BLOCK, _TILE),
        dgrad=Gemm(_BLOCK, _TILE),
        wgrad=Gemm(_BLOCK, _BLOCK),
    )
)

# No scale at all, for models whose tensors have unit variance by construction (unit-scaled weights,
# u-muP and muS): clip and cast. e5m2 for gradients, whose range is not so sure.
# Source: mu-nit scaling, arXiv:2502.05967, section 3.
_ONE = Quantizer(E4M3FN, scale="one")
_ONE_GRAD = Quantizer(E5M2, scale="one")
FP8_STATIC = register_recipe(
    Recipe(
        name="fp8_static",
        fwd=Gemm(_ONE, _ONE),
        dgrad=Gemm(_ONE_GRAD, _ONE),
        wgrad=Gemm(_ONE, _ONE_GRAD),
    )
)
