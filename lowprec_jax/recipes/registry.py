"""Recipes by name. Registering one makes it run through the conformance suite."""

from lowprec_jax.errors import UserError, did_you_mean
from lowprec_jax.recipes.recipe import Recipe

_REGISTRY: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe, *, alias: str | None = None) -> Recipe:
    """Adds a recipe under its name, or under an alias of it.

    Returns:
      The same recipe.

    Raises:
      ValueError: another recipe has this name.
    """
    name = alias or recipe.name
    if _REGISTRY.get(name, recipe) != recipe:
        raise ValueError(
            f"Recipe {name!r} is registered already as {_REGISTRY[name]!r}; choose another name."
        )
    _REGISTRY[name] = recipe
    return recipe


def get_recipe(name: str | Recipe) -> Recipe:
    """Looks a recipe up by name; a `Recipe` is returned as it is.

    Raises:
      UserError: no such name; the message lists the known names and the nearest.
    """
    if isinstance(name, Recipe):
        return name
    if name not in _REGISTRY:
        raise UserError(
            f"Unknown recipe {name!r}. Known: {', '.join(_REGISTRY)}."
            + did_you_mean(name, _REGISTRY)
        )
    return _REGISTRY[name]


def recipes() -> tuple[Recipe, ...]:
    """All registered recipes, each once, in the order of registration."""
    return tuple(dict.fromkeys(_REGISTRY.values()))
