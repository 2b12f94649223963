"""``none``: every matmul as JAX computes it. The baseline, and an oracle for the machinery."""

from lowprec_jax.recipes.recipe import Recipe
from lowprec_jax.recipes.registry import register_recipe

NONE = register_recipe(Recipe(name="none"))
register_recipe(NONE, alias="bf16")
