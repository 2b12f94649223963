"""How scales are chosen, for which operands, in which layers. Importing it registers the recipes.

A new recipe is one `register_recipe` call, here or in a user's own module.
"""

from lowprec_jax.recipes.fp8 import FP8_CURRENT, FP8_DELAYED, FP8_DELAYED_HP_FORWARD
from lowprec_jax.recipes.high_precision import NONE
from lowprec_jax.recipes.recipe import Gemm, Recipe, Role
from lowprec_jax.recipes.registry import get_recipe, recipes, register_recipe
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
    State,
    advance_state,
    amax_only,
    history_amax,
    init_state,
    is_calibrated,
    merge_observations,
)

__all__ = [
    "FP8_CURRENT",
    "FP8_DELAYED",
    "FP8_DELAYED_HP_FORWARD",
    "NONE",
    "Assignment",
    "Column",
    "Gemm",
    "Recipe",
    "Role",
    "Rule",
    "Rules",
    "State",
    "advance_state",
    "amax_only",
    "as_rules",
    "assign",
    "default_rules",
    "get_recipe",
    "history_amax",
    "init_state",
    "is_calibrated",
    "merge_observations",
    "recipes",
    "register_recipe",
]
