"""Alarms on reports written by hand."""

import json
import math

import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.training.alarms import Alarms
from lowprec_jax.training.guard_config import HealthConfig

CONFIG = HealthConfig(saturated=0.01, underflow=0.5, scale_age=100)
LIMITS = {"saturated": 0.01, "underflow": 0.5, "nonfinite": 0.0, "scale_age": 100.0}
NAME = "blocks/mlp/down[2] output_grad"


def row(amax=1.0, scale=0.5, saturated=0.0, underflow=0.0, nonfinite=0.0, scale_age=0.0):
    return [amax, scale, saturated, underflow, nonfinite, scale_age]


def told(alarms: Alarms, *rows) -> list[str]:
    """Kinds of the events of one operand's reports, "" where nothing happened."""
    return [
        " ".join(event["kind"] for event in alarms.check(step, {NAME: one}))
        for step, one in enumerate(rows)
    ]


@pytest.mark.parametrize("what", LIMITS)
def test_check__above_a_limit__alarms_once_and_is_over_once_at_half_of_it(what):
    limit = LIMITS[what]
    values = [limit, 1.5 * limit + 1, limit + 1, 0.6 * limit + (limit == 0), 0.5 * limit, 0]
    # Other amaxes: an old scale of an amax that does not change is right.
    reports = [row(amax=1.0 + i, **{what: value}) for i, value in enumerate(values)]
    assert told(Alarms(CONFIG), *reports) == ["", "alarm", "", "", "alarm_over", ""]


def test_check__events__say_what_and_where():
    alarms = Alarms(CONFIG)
    assert alarms.check(25, {"a lhs": row(), NAME: row(underflow=0.75)}) == [
        {"kind": "alarm", "operand": NAME, "what": "underflow", "value": 0.75, "limit": 0.5}
    ]
    assert alarms.active == {(NAME, "underflow"): 25}
    over = {"kind": "alarm_over", "operand": NAME, "what": "underflow", "value": 0.1, "limit": 0.5}
    assert alarms.check(75, {"a lhs": row(), NAME: row(underflow=0.1)}) == [over | {"since": 25}]
    assert alarms.active == {}


def test_check__several_limits__each_has_an_alarm_of_its_own():
    alarms = Alarms(CONFIG)
    first = alarms.check(1, {NAME: row(saturated=0.1, underflow=0.8), "a lhs": row(nonfinite=2.0)})
    assert [(e["operand"], e["what"]) for e in first] == [
        (NAME, "saturated"),
        (NAME, "underflow"),
        ("a lhs", "nonfinite"),
    ]
    (over,) = alarms.check(2, {NAME: row(underflow=0.8), "a lhs": row(nonfinite=1.0)})
    assert (over["kind"], over["operand"], over["what"]) == ("alarm_over", NAME, "saturated")


def test_check__old_scale_of_an_unchanged_amax__is_no_alarm():
    frozen, moving = row(amax=2.0, scale_age=500.0), row(amax=2.1, scale_age=525.0)
    assert told(Alarms(CONFIG), row(amax=2.0), frozen, frozen, moving) == ["", "", "", "alarm"]


@pytest.mark.parametrize("amax", [0.0, None, math.nan, math.inf])
def test_check__old_scale_and_an_unusable_amax__is_an_alarm(amax):
    old = row(amax=amax, scale_age=500.0)
    assert told(Alarms(CONFIG), row(amax=amax), old) == ["", "alarm"]


def test_check__operand_that_is_gone__is_over_without_a_value():
    alarms = Alarms(CONFIG)
    alarms.check(1, {NAME: row(saturated=0.1)})
    (event,) = alarms.check(2, {"a lhs": row()})
    assert (event["kind"], event["operand"], event["value"]) == ("alarm_over", NAME, None)
    assert alarms.check(3, {}) == []


def test_restore__through_json__goes_on_as_if_never_stopped():
    reports = [
        row(saturated=0.1, scale_age=90.0),
        row(amax=2.0, saturated=0.006, scale_age=115.0),
        row(amax=2.0, saturated=0.002, scale_age=140.0),
        row(amax=3.0, scale_age=165.0),
    ]
    straight, stopped = Alarms(CONFIG), Alarms(CONFIG)
    for step, report in enumerate(reports):
        expected = straight.check(step, {NAME: report})
        assert stopped.check(step, {NAME: report}) == expected
        stopped = Alarms.restore(CONFIG, json.loads(json.dumps(stopped.state(), allow_nan=False)))
    assert stopped.active == straight.active == {(NAME, "scale_age"): 3}


def test_state__amax_that_is_not_finite__is_json():
    alarms = Alarms(CONFIG)
    alarms.check(1, {NAME: row(amax=math.nan), "a lhs": row(amax=math.inf)})
    json.dumps(alarms.state(), allow_nan=False)


@pytest.mark.parametrize("state", [{}, {"active": [["a"]], "amaxes": {}}, {"active": None}])
def test_restore__something_else__is_an_error(state):
    with pytest.raises(UserError, match="Alarms cannot be restored"):
        Alarms.restore(CONFIG, state)
