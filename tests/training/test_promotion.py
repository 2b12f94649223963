"""Layers that a rollback suspects, and how long they stay in high precision."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec_jax.errors import UserError
from lowprec_jax.training.promotion import Promotion, layer_of, suspects

UP, DOWN = "blocks/mlp/up", "blocks/mlp/down"


# How long.


def test_promote__layers__are_in_high_precision_for_the_steps():
    promotion = Promotion(100)
    assert promotion.promote([UP, DOWN, UP], 500) == {UP: 600, DOWN: 600}
    assert promotion.paths(500) == promotion.paths(599) == {UP, DOWN}
    assert promotion.paths(600) == frozenset()


def test_promote__steps_zero__does_nothing():
    promotion = Promotion(0)
    assert promotion.promote([UP], 500) == {}
    assert promotion.paths(500) == frozenset()


def test_promote__nobody__does_nothing():
    assert Promotion(100).promote([], 500) == {}


@pytest.mark.parametrize(
    ("again", "until"),
    [
        (500, 700),  # rolled back to the same step
        (550, 750),  # while it is promoted
        (600, 800),  # when it is demoted
        (699, 899),  # soon after
        (700, 800),  # it went well for 100 steps: a first promotion again
    ],
)
def test_promote__again__is_for_twice_as_long_unless_it_went_well(again, until):
    promotion = Promotion(100)
    promotion.promote([UP], 500)
    assert promotion.promote([UP], again) == {UP: until}
    assert promotion.paths(until - 1) == {UP}
    assert promotion.paths(until) == frozenset()


def test_promote__again_and_again__doubles_up_to_eight_times():
    promotion = Promotion(10)
    lengths = [promotion.promote([UP], 0)[UP] for _ in range(6)]
    assert lengths == [10, 20, 40, 80, 80, 80]


def test_promote__one_layer_again__leaves_the_others():
    promotion = Promotion(100)
    promotion.promote([UP, DOWN], 0)
    promotion.promote([UP], 50)
    assert promotion.paths(120) == {UP}


def test_promote__after_going_back_far__never_ends_a_promotion_earlier():
    promotion = Promotion(100)
    promotion.promote([UP], 1000)
    assert promotion.promote([UP], 500) == {UP: 1100}
    assert promotion.paths(500) == {UP}


def test_paths__at_an_earlier_step__are_still_promoted():
    promotion = Promotion(100)
    promotion.promote([UP], 1000)
    assert promotion.paths(800) == {UP}


CALLS = st.lists(
    st.tuples(st.lists(st.sampled_from([UP, DOWN, "head"])), st.integers(0, 60)), max_size=12
)


@given(CALLS, CALLS)
def test_restore__anywhere__goes_on_as_if_never_stopped(before, after):
    promotion = Promotion(7)
    for paths, step in before:
        promotion.promote(paths, step)
    twin = Promotion.restore(7, json.loads(json.dumps(promotion.state())))
    for paths, step in after:
        assert twin.promote(paths, step) == promotion.promote(paths, step)
        assert all(twin.paths(s) == promotion.paths(s) for s in range(130))


def test_restore__with_other_steps__keeps_what_is_promoted_and_asks_the_new_ones_later():
    promotion = Promotion(100)
    promotion.promote([UP], 0)
    shorter, longer = (Promotion.restore(n, promotion.state()) for n in (10, 1000))
    assert shorter.paths(99) == longer.paths(99) == {UP}
    assert shorter.promote([UP, DOWN], 90) == {UP: 170, DOWN: 100}  # at most 8 x 10
    assert longer.promote([UP], 90) == {UP: 1090}
    assert Promotion.restore(0, promotion.state()).promote([UP], 0) == {}


@pytest.mark.parametrize("state", [{}, {"layers": None}, {"layers": {UP: 3}}, None])
def test_restore__what_is_no_state__is_refused(state):
    with pytest.raises(UserError, match="Promotions cannot be restored"):
        Promotion.restore(10, state)


# Which.


def row(*, scale=0.1, saturated=0.0, underflow=0.0, nonfinite=0.0, amax=1.0):
    return [amax, scale, saturated, underflow, nonfinite, 3.0]


def test_layer_of__operands__are_paths_without_index_and_role():
    assert layer_of("blocks/mlp/down[2] output_grad") == DOWN
    assert layer_of("blocks/3/mlp/down lhs") == "blocks/3/mlp/down"


def test_suspects__values_that_are_not_finite__come_first():
    operands = {
        "a[0] lhs": row(saturated=0.9),
        "b[0] output_grad": row(nonfinite=2.0, amax=None, saturated=None, underflow=None),
        "b[1] lhs": row(nonfinite=1.0, amax=math.inf),
        "c rhs": row(nonfinite=1.0, amax=math.nan),
    }
    assert suspects(operands, saturated=0.01) == ["b", "c"]


def test_suspects__clipping_above_the_limit__comes_next():
    operands = {
        "a lhs": row(underflow=0.9),
        "b rhs": row(saturated=0.02),
        "c rhs": row(saturated=0.011),
        "d rhs": row(saturated=0.01),
    }
    assert suspects(operands, saturated=0.01) == ["b", "c"]


def test_suspects__otherwise__is_the_one_that_loses_most():
    operands = {
        "a lhs": row(saturated=0.005, underflow=0.100),
        "b[0] lhs": row(underflow=0.104),
        "b[1] rhs": row(saturated=0.004, underflow=0.106),
        "c rhs": row(underflow=0.107),
    }
    assert suspects(operands, saturated=0.01) == ["b"]


def test_suspects__layers_that_are_not_quantized__are_none():
    operands = {
        "a lhs": row(scale=0.0, nonfinite=3.0),
        "a rhs": row(scale=0.0),
        "b lhs": row(scale=0.0, nonfinite=3.0),
        "b rhs": row(),
    }
    assert suspects(operands, saturated=0.01) == ["b"]


@pytest.mark.parametrize("operands", [{}, {"a lhs": row()}], ids=["no table", "nothing lost"])
def test_suspects__nothing_to_see__names_nobody(operands):
    assert suspects(operands, saturated=0.01) == []
