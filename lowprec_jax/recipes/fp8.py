"""FP8 with one scale per tensor.

HYBRID formats: e4m3fn where precision matters (activations, weights), e5m2 where range does
(output gradients).

Source: Micikevicius et al. 2022, arXiv:2209.05433, for the formats; DelayedScaling and
  Float8CurrentScaling, NVIDIA/TransformerEngine, common/recipe/__init__.py, for the scales.
"""

import dataclasses

from lowprec_jax.numerics import E4M3FN, E5M2
from lowprec_jax.recipes.recipe import Gemm, Recipe
from lowprec_jax.recipes.registry import register_recipe

# Scales from the tensor itself: no state to keep, never saturates, one more pass over the data.
FP8_CURRENT = register_recipe(
    Recipe(
        name="fp8_current",
        fwd=Gemm(E4M3FN, E4M3FN),
        dgrad=Gemm(E5M2, E4M3FN),
        wgrad=Gemm(E4M3FN, E5M2),
        scaling="current",
    )
)

# Scales from earlier steps: one pass over the data, no reduction in front of the matmul. The
# history is short: Transformer Engine's 1024 keeps one outlier's scale for 1024 steps.
FP8_DELAYED = register_recipe(
    dataclasses.replace(FP8_CURRENT, name="fp8_delayed", scaling="delayed")
)

# The forward pass as evaluation computes it, both backward GEMMs in FP8: the end of a run, where
# what is left of the gap is rounding in the forward pass (NVIDIA 2025, arXiv:2509.25149, section
# 4.6, for NVFP4).
FP8_DELAYED_HP_FORWARD = register_recipe(
    dataclasses.replace(FP8_DELAYED, name="fp8_delayed_hp_forward", fwd=None)
)
