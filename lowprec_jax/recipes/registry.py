"""Recipes by name. Registering one makes it run through the conformance suite."""

import re
from collections.abc import Callable
from typing import NamedTuple

from lowprec_jax.errors import UserError, did_you_mean
from lowprec_jax.recipes.recipe import Recipe


class _Family(NamedTuple):
    """Recipes that are made from their names."""

    shown: str
    pattern: str
    make: Callable[[re.Match[str]], Recipe]


_REGISTRY: dict[str, Recipe] = {}
_FAMILIES: list[_Family] = []


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


def register_family(shown: str, pattern: str, make: Callable[[re.Match[str]], Recipe]) -> None:
    """Adds recipes that are made from their names, such as ``w4a8``.

    Args:
      shown: how the names look, for messages.
      pattern: regular expression on the whole name.
      make: the recipe, from the match.
    """
    _FAMILIES.append(_Family(shown, pattern, make))


def get_recipe(name: str | Recipe) -> Recipe:
    """Looks a recipe up by name; a `Recipe` is returned as it is.

    Raises:
      UserError: no such name; the message lists the known names and the nearest.
    """
    if isinstance(name, Recipe):
        return name
    if name in _REGISTRY:
        return _REGISTRY[name]
    for family in _FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            return family.make(match)
    known = ", ".join([*_REGISTRY, *(family.shown for family in _FAMILIES)])
    raise UserError(f"Unknown recipe {name!r}. Known: {known}." + did_you_mean(name, _REGISTRY))


def recipes() -> tuple[Recipe, ...]:
    """All registered recipes, each once, in the order of registration."""
    return tuple(dict.fromkeys(_REGISTRY.values()))
