"""benchmarks/peer_scenarios.py: right here, and wrong where the table says so of Flax's op."""

import functools

import pytest

from benchmarks.peer_scenarios import Finding, Flax, Ours, Scenario, measure, scenarios

# What Flax's state comes out as, as far as it is quick to run; the script runs all of it.
WRONG_IN_FLAX = {
    "accumulate": 121.286,  # mean of the amaxes of the micro-batches
    "multi_steps": 4,
    "idle_amax": 0,
    "pmap": 102.896,  # mean of the amaxes of the devices
}
# Steps of the scan behind "inf": enough for ours; 1024 of them are frozen in Flax.
SHORT = {"inf": {"steps": 8}}


@pytest.mark.parametrize("name", scenarios())
def test_scenario__this_library__is_right(name):
    scenario = scenarios()[name]
    run = functools.partial(scenario.run, Ours, **SHORT.get(name, {}))
    finding = measure(scenario, run)
    assert finding.right, (finding.value, scenario.right)


@pytest.mark.parametrize("name", WRONG_IN_FLAX)
def test_scenario__state_of_flax__is_wrong_as_documented(name):
    scenario = scenarios()[name]
    finding = measure(scenario, functools.partial(scenario.run, Flax))
    assert not finding.right
    assert finding.value == pytest.approx(WRONG_IN_FLAX[name], rel=1e-5)


@pytest.mark.parametrize(
    ("value", "right"), [(1.0, True), (2.0, True), (2.1, False), (float("nan"), False)]
)
def test_measure__number__is_right_within_the_interval(value, right):
    scenario = Scenario("", lambda lib: value, 1, 2)
    assert measure(scenario, lambda: scenario.run(Ours)).right == right


def test_measure__exception__is_a_wrong_finding():
    def run():
        raise ValueError("first line\nsecond line")

    finding = measure(Scenario("", lambda lib: 0.0, 0, 1), run)
    assert finding == Finding("ValueError: first line", False)
    assert str(finding) == "ValueError WRONG"
