"""Recipes by name."""

import dataclasses

import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.recipes import (
    FP8_CURRENT,
    FP8_DELAYED,
    NONE,
    Recipe,
    get_recipe,
    recipes,
    register_recipe,
    registry,
)


@pytest.fixture
def scratch_registry(monkeypatch):
    """A copy of the registry, so that no other test sees what is registered."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def test_get_recipe__registered_names__are_found():
    assert get_recipe("none") is NONE
    assert get_recipe("bf16") is NONE
    assert get_recipe("fp8_delayed") is FP8_DELAYED
    assert get_recipe("fp8_current") is FP8_CURRENT


def test_get_recipe__recipe__is_returned_as_it_is():
    recipe = Recipe(name="never registered")
    assert get_recipe(recipe) is recipe


def test_get_recipe__misspelt__lists_names_and_suggests_the_nearest():
    with pytest.raises(UserError, match=r"'fp8_delaid'.*Known: .*none.*mean 'fp8_delayed'"):
        get_recipe("fp8_delaid")


def test_recipes__aliases__are_listed_once():
    names = [recipe.name for recipe in recipes()]
    assert sorted(names) == sorted(set(names))
    assert {"none", "fp8_delayed", "fp8_current"} <= set(names)
    assert "bf16" not in names


@pytest.mark.usefixtures("scratch_registry")
def test_register_recipe__new_recipe__is_returned_found_and_listed_last():
    recipe = dataclasses.replace(FP8_DELAYED, name="mine", margin=2)
    assert register_recipe(recipe) is recipe
    assert get_recipe("mine") is recipe
    assert recipes()[-1] is recipe


@pytest.mark.usefixtures("scratch_registry")
def test_register_recipe__taken_name__is_refused_and_changes_nothing():
    other = dataclasses.replace(FP8_DELAYED, margin=2)
    with pytest.raises(ValueError, match="'fp8_delayed' is registered already"):
        register_recipe(other)
    with pytest.raises(ValueError, match="'bf16' is registered already"):
        register_recipe(other, alias="bf16")
    assert get_recipe("fp8_delayed") is FP8_DELAYED


@pytest.mark.usefixtures("scratch_registry")
def test_register_recipe__same_recipe_twice__is_accepted():
    assert register_recipe(dataclasses.replace(FP8_DELAYED)) == FP8_DELAYED
    assert len(recipes()) == len({r.name for r in recipes()})
