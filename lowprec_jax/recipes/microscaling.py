"""Microscaling: blocks of 32 with power-of-two scales (OCP MX), and NVFP4's blocks of 16.

Source: OCP Microscaling Formats 1.0; MXFP8 training, arXiv:2506.08027; MXFP4 training with
  stochastic rounding and Hadamard rotations, arXiv:2502.20586; NVFP4 training, arXiv:2509.25149.
"""

import dataclasses

from lowprec_jax.numerics import E2M1, E4M3FN, Quantizer
from lowprec_jax.recipes.recipe import Gemm, Recipe
from lowprec_jax.recipes.registry import register_recipe

# e4m3fn for gradients too: the range is the block's affair. Scales are rounded up, so that nothing
# saturates: OCP's own rule (floor) can make training diverge.
_MXFP8 = Quantizer(E4M3FN, contract=32, free=1, scale="rceil")
MXFP8 = register_recipe(
    Recipe(
        name="mxfp8",
        fwd=Gemm(_MXFP8, _MXFP8),
        dgrad=Gemm(_MXFP8, _MXFP8),
        wgrad=Gemm(_MXFP8, _MXFP8),
    )
)

# In the forward pass the rule with the smallest error; for gradients one that never saturates,
# since a clipped value has no unbiased rounding.
_MXFP4 = Quantizer(E2M1, contract=32, free=1, scale="even")
_MXFP4_GRAD = dataclasses.replace(_MXFP4, scale="rceil", rounding="stochastic")
MXFP4 = register_recipe(
    Recipe(
        name="mxfp4",
        fwd=Gemm(_MXFP4, _MXFP4),
        dgrad=Gemm(_MXFP4_GRAD, _MXFP4),
        wgrad=Gemm(
            dataclasses.replace(_MXFP4, hadamard=32),
            dataclasses.replace(_MXFP4_GRAD, hadamard=32),
        ),
    )
)

# Weights in 16 x 16 tiles, so that forward and backward pass see the same weights; stochastic
# rounding of gradients, or small ones would round to zero for good; a rotation of the operands of
# wgrad, so that outliers spread over their block. Keep the first and last blocks of the model high.
_NVFP4 = Quantizer(E2M1, contract=16, free=1, scale="nvfp4")
_NVFP4_WEIGHT = dataclasses.replace(_NVFP4, free=16)
_NVFP4_GRAD = dataclasses.replace(_NVFP4, rounding="stochastic")
NVFP4 = register_recipe(
    Recipe(
        name="nvfp4",
        fwd=Gemm(_NVFP4, _NVFP4_WEIGHT),
        dgrad=Gemm(_NVFP4_GRAD, _NVFP4_WEIGHT),
        wgrad=Gemm(
            dataclasses.replace(_NVFP4, hadamard=16),
            dataclasses.replace(_NVFP4_GRAD, hadamard=16),
        ),
    )
)
