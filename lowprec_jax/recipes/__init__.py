"""How scales are chosen, for which operands, in which layers. Importing it registers the recipes.

A new recipe is one `register_recipe` call, here or in a user's own module.
"""

from lowprec_jax.recipes.fp8 import FP8_CURRENT, FP8_DELAYED, FP8_DELAYED_HP_FORWARD
from lowprec_jax.recipes.fp8_fine import (
    FP8_BLOCK,
    FP8_ROWWISE,
    FP8_ROWWISE_HP_WGRAD,
    FP8_STATIC,
)
from lowprec_jax.recipes.high_precision import NONE
from lowprec_jax.recipes.integer import INT4_WEIGHTS, INT8, NF4_WEIGHTS, fake_quantized
from lowprec_jax.recipes.microscaling import MXFP4, MXFP8, NVFP4
from lowprec_jax.recipes.recipe import Gemm, Recipe, Role
from lowprec_jax.recipes.registry import get_recipe, recipes, register_family, register_recipe
from lowprec_jax.recipes.rules import (
    Assignment,
    Rule,
    Rules,
    as_rules,
    assign,
    default_rules,
)
from lowprec_jax.recipes.scaling_state import (
    Column,
    Record,
    State,
    advance_state,
    amax_only,
    history_amax,
    history_scales,
    init_state,
    is_calibrated,
    merge_observations,
)
from lowprec_jax.recipes.target import (
    Target,
    get_target,
    register_target,
    targets,
    translate,
    translate_rules,
)

__all__ = [
    "FP8_BLOCK",
    "FP8_CURRENT",
    "FP8_DELAYED",
    "FP8_DELAYED_HP_FORWARD",
    "FP8_ROWWISE",
    "FP8_ROWWISE_HP_WGRAD",
    "FP8_STATIC",
    "INT4_WEIGHTS",
    "INT8",
    "MXFP4",
    "MXFP8",
    "NF4_WEIGHTS",
    "NONE",
    "NVFP4",
    "Assignment",
    "Column",
    "Gemm",
    "Recipe",
    "Record",
    "Role",
    "Rule",
    "Rules",
    "State",
    "Target",
    "advance_state",
    "amax_only",
    "as_rules",
    "assign",
    "default_rules",
    "fake_quantized",
    "get_recipe",
    "get_target",
    "history_amax",
    "history_scales",
    "init_state",
    "is_calibrated",
    "merge_observations",
    "recipes",
    "register_family",
    "register_recipe",
    "register_target",
    "targets",
    "translate",
    "translate_rules",
]
