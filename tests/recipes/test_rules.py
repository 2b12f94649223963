"""Which recipe a layer gets."""

import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.recipes import (
    FP8_CURRENT,
    FP8_DELAYED,
    NONE,
    Rule,
    as_rules,
    assign,
    default_rules,
)


def _recipes(paths, rules):
    return {a.path: a.recipe for a in assign(paths, rules)}


def test_assign__several_rules_match__first_wins():
    paths = ["blocks/0/attn/q", "blocks/0/mlp/up", "blocks/1/mlp/up"]
    rules = [Rule("blocks/0/.*", "none"), Rule(".*/mlp/.*", "fp8_current"), Rule(".*", FP8_DELAYED)]
    assert _recipes([*paths, "x"], rules) == {
        "blocks/0/attn/q": NONE,
        "blocks/0/mlp/up": NONE,
        "blocks/1/mlp/up": FP8_CURRENT,
        "x": FP8_DELAYED,
    }


def test_assign__pattern_matches_a_part_only__is_no_match():
    assert _recipes(["mlp/up", "mlp"], [Rule("mlp", FP8_CURRENT)]) == {
        "mlp/up": NONE,
        "mlp": FP8_CURRENT,
    }


def test_assign__no_rule_matches__high_precision_with_the_reason():
    (assignment,) = assign(["a"], [Rule("b", FP8_CURRENT, required=False)])
    assert (assignment.path, assignment.recipe) == ("a", NONE)
    assert assignment.reason == "no rule matches"


def test_assign__reasons__name_the_rule_or_the_default():
    reasons = {
        a.path: a.reason
        for a in assign(["up", "lm_head"], [("up", "none"), *default_rules("none")])
    }
    assert reasons == {"up": "rule 'up'", "lm_head": "high precision by default"}


def test_assign__required_rule_matches_nothing__lists_the_layers():
    with pytest.raises(UserError, match=r"'blocks/\.\*' matches no layer.*up, down\. Patterns"):
        assign(["up", "down"], [Rule("blocks/.*", FP8_CURRENT)])
    with pytest.raises(UserError, match="The layers are: none"):
        assign([], [Rule("blocks/.*", FP8_CURRENT)])


def test_assign__shadowed_required_rule__is_no_error():
    assert _recipes(["up"], [Rule(".*", NONE), Rule("up", FP8_CURRENT)]) == {"up": NONE}


def test_assign__paths_are_an_iterator__all_are_assigned():
    assert len(assign(iter(["a", "b"]), "fp8_current")) == 2


def test_assign__unknown_recipe__is_an_error_before_any_match():
    with pytest.raises(UserError, match="Unknown recipe 'fp9'"):
        assign(["a"], [Rule("b", "fp9", required=False)])


HIGH = ["embed", "tok_embeddings", "wte", "wpe", "head", "lm_head", "output_head", "logits"]
HIGH += ["router", "moe_router", "norm", "layernorm"]
LOW = ["q", "mlp/up", "headroom", "attn/heads", "blocks/0/attn/qkv", "routers"]


@pytest.mark.parametrize("path", HIGH)
def test_default_rules__embedding_head_router_norm__stay_in_high_precision(path):
    paths = [path, f"decoder/{path}", f"{path}/kernel", f"a/b/{path}/c"]
    assert set(_recipes(paths, "fp8_delayed").values()) == {NONE}


@pytest.mark.parametrize("path", LOW)
def test_default_rules__everything_else__gets_the_recipe(path):
    assert _recipes([path], "fp8_delayed") == {path: FP8_DELAYED}


@pytest.mark.parametrize("given", ["fp8_current", FP8_CURRENT])
def test_as_rules__recipe_or_name__is_the_default_rules(given):
    assert as_rules(given) == default_rules(FP8_CURRENT)


def test_as_rules__pairs__become_required_rules_with_recipes():
    (rule,) = as_rules([("a/.*", "fp8_current")])
    assert rule == Rule("a/.*", FP8_CURRENT, required=True)


def test_rule__invalid_regular_expression__is_a_user_error_with_examples():
    with pytest.raises(UserError, match=r"'\(a' is no regular expression.*blocks/\.\*"):
        Rule("(a", NONE)
