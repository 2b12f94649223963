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

    A registered recipe of such a name comes first. A name that two families match is refused when
    it is looked up: patterns that overlap are of no harm where nobody asks.

    Args:
      shown: how the names look, for messages.
      pattern: regular expression on the whole name.
      make: the recipe, from the match.

    Raises:
      ValueError: another family looks like this or has this pattern, or `pattern` is no regular
        expression.
    """
    family = _Family(shown, pattern, make)
    for other in _FAMILIES:
        if other != family and (other.shown == shown or other.pattern == pattern):
            raise ValueError(
                f"Recipe family {shown!r} with pattern {pattern!r}: {other.shown!r} with "
                f"{other.pattern!r} is registered already; choose another name and pattern."
            )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"Recipe family {shown!r}: pattern {pattern!r} is no regular expression ({error})."
        ) from error
    if family not in _FAMILIES:
        _FAMILIES.append(family)


def get_recipe(name: str | Recipe) -> Recipe:
    """Looks a recipe up by name; a `Recipe` is returned as it is.

    Raises:
      UserError: no such name; the message lists the known names and the nearest. Or the name is in
        two families.
    """
    if isinstance(name, Recipe):
        return name
    if name in _REGISTRY:
        return _REGISTRY[name]
    found = [(f, match) for f in _FAMILIES if (match := re.fullmatch(f.pattern, name))]
    if len(found) > 1:
        raise UserError(
            f"Recipe {name!r} is ambiguous: it is in the families "
            f"{' and '.join(repr(family.shown) for family, _ in found)}. Register a recipe of this "
            "name, or change the pattern of a family."
        )
    if found:
        family, match = found[0]
        return family.make(match)
    known = ", ".join([*_REGISTRY, *(family.shown for family in _FAMILIES)])
    raise UserError(f"Unknown recipe {name!r}. Known: {known}." + did_you_mean(name, _REGISTRY))


def recipes() -> tuple[Recipe, ...]:
    """All registered recipes, each once, in the order of registration."""
    return tuple(dict.fromkeys(_REGISTRY.values()))
