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
    register_family,
    register_recipe,
    registry,
)


@pytest.fixture
def scratch_registry(monkeypatch):
    """A copy of the registry, so that no other test sees what is registered."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_FAMILIES", list(registry._FAMILIES))


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


def margin_of(match):
    return dataclasses.replace(FP8_DELAYED, name=match[0], margin=int(match[1]))


@pytest.mark.usefixtures("scratch_registry")
def test_register_family__name_in_two__is_refused_when_looked_up_and_others_are_found():
    register_family("m<n>", r"m(\d+)", margin_of)
    register_family("m<n>0", r"m(\d+)0", margin_of)
    assert get_recipe("m3").margin == 3
    with pytest.raises(UserError, match=r"'m30' is ambiguous.* 'm<n>' and 'm<n>0'\. Register"):
        get_recipe("m30")


@pytest.mark.usefixtures("scratch_registry")
def test_register_family__recipe_registered_under_an_ambiguous_name__comes_first():
    register_family("m<n>", r"m(\d+)", margin_of)
    register_family("m<n>0", r"m(\d+)0", margin_of)
    mine = register_recipe(dataclasses.replace(FP8_DELAYED, name="m30", margin=7))
    assert get_recipe("m30") is mine


@pytest.mark.usefixtures("scratch_registry")
@pytest.mark.parametrize(("shown", "pattern"), [("m<n>", r"n(\d+)"), ("n<n>", r"m(\d+)")])
def test_register_family__taken_look_or_pattern__is_refused_and_changes_nothing(shown, pattern):
    register_family("m<n>", r"m(\d+)", margin_of)
    with pytest.raises(ValueError, match=r"'m<n>' with 'm\(\\+d\+\)' is registered already"):
        register_family(shown, pattern, margin_of)
    assert get_recipe("m3").margin == 3
    with pytest.raises(UserError, match="Unknown recipe 'n3'"):
        get_recipe("n3")


@pytest.mark.usefixtures("scratch_registry")
def test_register_family__same_family_twice__is_one():
    register_family("m<n>", r"m(\d+)", margin_of)
    register_family("m<n>", r"m(\d+)", margin_of)
    assert get_recipe("m3").margin == 3


@pytest.mark.usefixtures("scratch_registry")
def test_register_family__pattern_that_is_no_regular_expression__is_refused():
    with pytest.raises(ValueError, match=r"'m\(' is no regular expression \(missing \)"):
        register_family("m(", "m(", margin_of)
    assert get_recipe("w4a8").name == "w4a8"
