"""Which recipe a layer gets: patterns on module paths, first match wins."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from lowprec_jax.errors import UserError
from lowprec_jax.recipes.high_precision import NONE
from lowprec_jax.recipes.recipe import Recipe
from lowprec_jax.recipes.registry import get_recipe

# Named layers whose precision decides quality and whose matmul is a small part of the work. By
# name, not by position: the order of a module's attributes is not the order of execution.
HIGH_PRECISION_LAYERS = (
    r"(?i)(.*/)?(\w*embed\w*|wte|wpe|(lm_|output_)?head|logits|\w*router|\w*norm)(/.*)?"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Gives the layers whose path matches a recipe.

    Attributes:
      path: regular expression on the whole path, components joined by ``/`` (``"blocks/.*"``).
      recipe: a recipe or its registered name.
      required: whether a pattern that matches no layer is an error.
    """

    path: str
    recipe: Recipe | str
    required: bool = True

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise UserError(
                f"Rule path {self.path!r} is no regular expression: {error}. Write for example "
                "'blocks/.*' or '.*/mlp/down'."
            ) from None


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The recipe of one layer and the reason for it."""

    path: str
    recipe: Recipe
    reason: str


Rules = str | Recipe | Sequence[Rule | tuple[str, Recipe | str]]


def default_rules(recipe: Recipe | str) -> tuple[Rule, ...]:
    """Embeddings, heads, routers and norms in high precision, everything else in `recipe`."""
    return (
        Rule(HIGH_PRECISION_LAYERS, NONE, required=False),
        Rule(".*", get_recipe(recipe), required=False),
    )


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """Normalises what a user may pass as rules.

    A recipe or a name stands for `default_rules`. A sequence is taken as it is; layers that no rule
    matches stay in high precision. ``[*mine, *default_rules("fp8_delayed")]`` has both.
    """
    if isinstance(rules, str | Recipe):
        return default_rules(rules)
    normal = (rule if isinstance(rule, Rule) else Rule(*rule) for rule in rules)
    return tuple(dataclasses.replace(rule, recipe=get_recipe(rule.recipe)) for rule in normal)


def assign(paths: Iterable[str], rules: Rules) -> list[Assignment]:
    """The recipe of every layer.

    Args:
      paths: paths of the layers that can be quantized, components joined by ``/``.
      rules: see `as_rules`.

    Raises:
      UserError: a required rule matches no path; the message lists the paths.
    """
    paths, ordered = list(paths), as_rules(rules)
    assignments = [_assign_one(path, ordered) for path in paths]
    for rule in ordered:
        if rule.required and not any(re.fullmatch(rule.path, path) for path in paths):
            raise UserError(
                f"Rule {rule.path!r} matches no layer. The layers are: "
                f"{', '.join(paths) or 'none'}. Patterns are regular expressions on the whole path."
            )
    return assignments


def _assign_one(path: str, rules: Sequence[Rule]) -> Assignment:
    for rule in rules:
        if re.fullmatch(rule.path, path):
            high_by_default = rule.path == HIGH_PRECISION_LAYERS
            reason = "high precision by default" if high_by_default else f"rule {rule.path!r}"
            return Assignment(path, get_recipe(rule.recipe), reason)
    return Assignment(path, NONE, "no rule matches")
