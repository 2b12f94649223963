"""docs/recipes.md: every registered recipe has a row, and the row says what the recipe is."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from lowprec_jax.numerics import E8M0_RULES, formats
from lowprec_jax.recipes import Role, get_recipe, recipes

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
FORMATS = {fmt.name for fmt in formats()}
# Families have no members that are registered; the first of the row stands for all.
FAMILIES = {"w4a8"}


class Facts(NamedTuple):
    """What a row says; a row of several recipes has the facts of all."""

    operands: frozenset  # formats of lhs and rhs
    gradients: frozenset  # formats of output_grad
    high: frozenset  # what stays in high precision, of a recipe that quantizes
    activations: frozenset  # (contract, free) of lhs and output_grad
    weights: frozenset  # (contract, free) of rhs
    scales: frozenset  # kinds of scales
    source: frozenset
    state: frozenset


def facts_of(name: str) -> Facts:
    recipe = get_recipe(name)
    lhs, rhs, grad = ({*recipe.quantizers_of(role)} - {None} for role in Role)
    high = {
        "forward": recipe.quantizes and recipe.fwd is None,
        "wgrad": recipe.quantizes and recipe.wgrad is None and bool(lhs),
        "activations": recipe.quantizes and not lhs,
    }
    rules = {q.scale for q in lhs | rhs | grad}
    scales = {
        "E8M0": bool(rules & {*E8M0_RULES}),
        "rounded up": rules == {"rceil"},
        "e4m3 under f32": "nvfp4" in rules,
        "scale 1": "one" in rules,
    }
    state = {
        "amax history": recipe.delayed,
        "step counter": recipe.stochastic,
        "none": not recipe.stateful,
    }
    source = {
        "earlier steps": recipe.delayed,
        "nothing": rules == {"one"},
        "the tensor": recipe.quantizes and not recipe.delayed and rules != {"one"},
    }
    return Facts(
        frozenset(q.format.name for q in lhs | rhs),
        frozenset(q.format.name for q in grad),
        frozenset(k for k, holds in high.items() if holds),
        frozenset((q.contract, q.free) for q in lhs | grad),
        frozenset((q.contract, q.free) for q in rhs),
        frozenset(k for k, holds in scales.items() if holds),
        frozenset(k for k, holds in source.items() if holds),
        frozenset(k for k, holds in state.items() if holds),
    )


def union(several) -> Facts:
    return Facts(*(frozenset().union(*field) for field in zip(*several, strict=True)))


def sizes_in(text: str) -> set:
    """(contract, free) of each size: ``tensor``, ``row``, ``32`` (1 x 32), ``1x128``."""
    if re.search("tensor|scale 1", text):
        return {(None, None)}
    if "row" in text:
        return {(None, 1)}
    found = re.findall(r"(?:(\d+)x)?(\d+)", re.sub(r"\b(E8M0|e4m3|f32)\b", "", text))
    return {(int(contract), int(free or 1)) for free, contract in found}


def facts_in(names: list[str], operands: str, elements: str, source: str, state: str) -> Facts:
    """What the cells of a row say."""
    of_operands, said, of_gradients = operands.partition("gradients ")
    words = {"weight gradient high": "wgrad", "backward GEMMs only": "forward"}
    words["weights only"] = "activations"
    found = {*re.findall(r"\w+", of_operands)} & FORMATS
    if "integers" in operands:  # the name of a family says how many bits
        found = {f"int{bits}" for bits in re.findall(r"\d+", names[0])}
    gradients = {*re.findall(r"\w+", of_gradients)} & FORMATS if said else found
    if re.search("weights only|fake-quantized", operands):
        gradients = set()
    of_all, _, of_weights = elements.partition("weights ")
    activations = sizes_in(of_all) if operands != "as they are" else set()
    kinds = ("E8M0", "rounded up", "e4m3 under f32", "scale 1")
    return Facts(
        frozenset(found),
        frozenset(gradients),
        frozenset(v for k, v in words.items() if k in operands),
        frozenset(activations if "weights only" not in operands else ()),
        frozenset(sizes_in(of_weights.partition(",")[0]) if of_weights else activations),
        frozenset(kind for kind in kinds if kind in elements),
        frozenset(filter(None, [source])),
        frozenset([state]),
    )


def table() -> dict[tuple[str, ...], list[str]]:
    """The cells of each row by the recipes that it names, ``the same`` written out."""
    rest = PAGE.partition("\n| recipe | operands | elements per scale | scales from | state |")[2]
    rows: dict[tuple[str, ...], list[str]] = {}
    before = ""
    for line in rest.split("\n\n")[0].splitlines()[2:]:
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        cells[0] = cells[0].replace("the same", before)
        before = re.split(", (?:weight gradient|backward GEMMs)", cells[0])[0]
        rows[tuple(re.findall(r"`(\w+)`", names))] = cells[:4]
    return rows


ROWS = table()


@pytest.mark.parametrize("names", ROWS, ids=",".join)
def test_recipes_table__row__says_what_its_recipes_are(names):
    told = [*FAMILIES & {*names}] or list(names)
    assert facts_in(told, *ROWS[names]) == union(facts_of(name) for name in told)


def test_recipes_table__names__are_every_registered_recipe_once():
    named = [name for names in ROWS for name in names]
    assert len({*named}) == len(named)
    assert {recipe.name for recipe in recipes()} <= {*named}
    assert all(get_recipe(name) for name in named)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("fp8_delayed", "e5m2", "e4m3fn"),
        ("fp8_delayed", "tensor", "row, channel"),
        ("fp8_delayed", "earlier steps", "the tensor"),
        ("fp8_delayed", "amax history", "none"),
        ("fp8_delayed_hp_forward", ", backward GEMMs only", ""),
        ("fp8_rowwise_hp_wgrad", ", weight gradient high", ""),
        ("fp8_block", "weights 128x128", "weights 1x128"),
        ("fp8_block", "1x128, ", "64, "),
        ("mxfp8", ", rounded up", ""),
        ("mxfp4", "step counter", "none"),
        ("nvfp4", ", e4m3 under f32", ""),
        ("fp8_static", "nothing", "the tensor"),
        ("nf4_weights", "64", "32"),
        ("w4a8", "row, channel", "tensor"),
    ],
)
def test_recipes_table__wrong_row__would_be_seen(name, old, new):
    (names,) = [names for names in ROWS if name in names]
    told = [*FAMILIES & {*names}] or list(names)
    wrong = [cell.replace(old, new) for cell in ROWS[names]]
    assert wrong != ROWS[names]
    assert facts_in(told, *wrong) != union(facts_of(name) for name in told)
