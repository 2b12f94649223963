"""The guard: what is a spike, what is done about it, and that every run comes to an end."""

import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec_jax.errors import UserError
from lowprec_jax.training import guard_config
from lowprec_jax.training.guard import Guard, Verdict

pytestmark = pytest.mark.reliability

# Three in a row, so that a row can be broken in the middle.
GuardConfig = functools.partial(guard_config.GuardConfig, max_spikes=3)

OK, SKIPPED, SPIKE = Verdict.OK, Verdict.SKIPPED, Verdict.SPIKE
ROLL_BACK, STOP = Verdict.ROLL_BACK, Verdict.STOP
NAN = math.nan


def record(step, loss, *, skipped=0):
    return {"step": step, "loss": loss, "grad_norm": NAN if skipped else 1.0, "skipped": skipped}


def observe(guard, losses, *, first=1):
    """Verdicts on steps from `first` on; NaN is the loss of an update that was skipped."""
    return [
        guard.observe(record(step, float(loss), skipped=int(np.isnan(loss))))
        for step, loss in enumerate(losses, first)
    ]


def noisy(count, *, mean=3.0, std=0.05, seed=0):
    return mean + std * np.random.default_rng(seed).normal(size=count)


# What is a spike.


@pytest.mark.parametrize("seed", range(8))
def test_observe__ten_thousand_gaussian_losses__raise_no_false_alarm(seed):
    assert set(observe(Guard(guard_config.GuardConfig()), noisy(10_000, seed=seed))) == {OK}


@pytest.mark.parametrize(
    "curve",
    [
        lambda t: 1.5 + 9.5 * np.exp(-t / 30),  # steep, then flat
        lambda t: 11.0 * t**-0.25,  # a power law
        lambda t: 1.0 + 9.0 * np.exp(-t / 400) + 2.0 * np.exp(-(((t - 150) / 60) ** 2)),  # a hump
        lambda t: 0.001 + 4.0 * np.exp(-t / 100),  # learned by heart
    ],
    ids=["exponential", "power law", "hump after the warmup", "to zero"],
)
@pytest.mark.parametrize("seed", range(3))
def test_observe__falling_noisy_loss__raises_no_false_alarm(curve, seed):
    losses = curve(np.arange(1.0, 4001)) * (1 + noisy(4000, mean=0, std=0.03, seed=seed))
    assert set(observe(Guard(guard_config.GuardConfig()), losses)) == {OK}


def test_observe__losses_that_wander__raise_no_false_alarm():
    noise, losses = noisy(5000, mean=0, std=0.02, seed=5), [3.0]
    for x in noise:
        losses.append(3.0 + 0.97 * (losses[-1] - 3.0) + x)
    assert set(observe(Guard(guard_config.GuardConfig()), losses)) == {OK}


@pytest.mark.parametrize("seed", range(4))
def test_observe__loss_ten_times_as_large__is_caught_at_once_and_rolled_back_in_three_steps(seed):
    guard = Guard(GuardConfig())
    assert set(observe(guard, noisy(300, seed=seed))) == {OK}
    verdicts = observe(guard, 10 * noisy(3, seed=seed + 100), first=301)
    assert verdicts == [SPIKE, SPIKE, ROLL_BACK]


def test_observe__one_spike__is_flagged_and_forgotten():
    guard = Guard(GuardConfig())
    observe(guard, noisy(200))
    before, limit = guard.state()["losses"], guard.limit
    assert observe(guard, [30.0], first=201) == [SPIKE]
    assert not guard.sound
    assert guard.state()["losses"] == before
    assert observe(guard, [3.0], first=202) == [OK]
    assert guard.sound
    assert guard.limit == pytest.approx(limit, rel=0.01)


def test_limit__of_losses__is_that_of_numpy_over_the_newest_window():
    losses = noisy(100, std=0.3)
    guard = Guard(GuardConfig(sigma=4, window=20, min_window=10))
    observe(guard, losses)
    guard.observe(record(101, 3.0))
    newest = losses[-20:]
    deviation = 1.4826 * np.median(np.abs(newest - np.median(newest)))
    assert guard.limit == pytest.approx(np.median(newest) + 4 * deviation, rel=1e-12)


@pytest.mark.parametrize(
    ("level", "highest"),
    [(8.0, 8 * (1 + 6 / 256)), (-8.0, -8 * (1 - 6 / 256)), (0.0, 6 / 256), (0.5, 0.5 + 6 / 256)],
)
def test_limit__of_a_constant_loss__leaves_room_for_rounding(level, highest):
    guard = Guard(GuardConfig())
    assert set(observe(guard, [level] * 64)) == {OK}
    assert observe(guard, [highest + 1e-6, highest - 1e-6], first=65) == [SPIKE, OK]
    assert guard.limit == pytest.approx(highest, abs=1e-12)


def test_observe__before_enough_losses_are_known__nothing_finite_is_a_spike():
    guard = Guard(GuardConfig(min_window=10, window=10))
    assert observe(guard, [1.0] * 9 + [100.0]) == [OK] * 10
    assert guard.limit is None
    assert observe(guard, [1000.0], first=11) == [SPIKE]


# What is not finite.


def test_observe__losses_that_are_nan__poison_nothing():
    clean, poisoned = Guard(GuardConfig()), Guard(GuardConfig())
    losses = noisy(300)
    observe(clean, losses)
    observe(poisoned, np.insert(losses, [3, 70, 70, 70, 70, 200], NAN))
    assert poisoned.state()["losses"] == clean.state()["losses"]
    after = [3.0, 40.0, NAN, 3.0, 3.1]
    assert observe(poisoned, after, first=400) == [OK, SPIKE, SKIPPED, OK, OK]
    assert observe(clean, after, first=400) == [OK, SPIKE, SKIPPED, OK, OK]
    assert clean.limit == poisoned.limit


@pytest.mark.parametrize("loss", [NAN, math.inf, None, 3.0])
def test_observe__skipped_updates__are_counted_and_never_measured(loss):
    guard = Guard(GuardConfig(max_skipped=3))
    for step in (1, 2):
        assert guard.observe(record(step, loss, skipped=1)) is SKIPPED
        assert not guard.sound
    assert guard.observe(record(3, loss, skipped=1)) is ROLL_BACK
    assert guard.state()["losses"] == []
    assert "not finite" in guard.reason
    assert "3 in a row" in guard.reason


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf, None])
def test_observe__loss_that_is_not_finite_but_was_applied__is_a_spike_at_any_step(loss):
    guard = Guard(GuardConfig())
    assert guard.observe(record(1, loss)) is SPIKE
    assert guard.state()["losses"] == []


def test_observe__sound_step__ends_a_row_but_one_of_the_other_kind_does_not():
    guard = Guard(GuardConfig(max_skipped=2, max_spikes=2, min_window=2, window=2))
    observe(guard, [1.0, 1.0])
    assert observe(guard, [9.0, 1.0, 9.0], first=3) == [SPIKE, OK, SPIKE]
    assert observe(guard, [NAN, 9.0], first=6) == [SKIPPED, ROLL_BACK]


# Going back.


def failing_guard(**changes):
    """A guard that has seen 100 sound steps and asks at step 103 to go back."""
    guard = Guard(GuardConfig(**changes))
    observe(guard, noisy(80))
    guard.saved(80)
    saved = guard.state()
    observe(guard, noisy(20, seed=1), first=81)
    assert observe(guard, [30.0] * 3, first=101)[-1] in (ROLL_BACK, STOP)
    return guard, json.loads(json.dumps(saved))


def test_observe__until_the_run_is_rolled_back__the_verdict_stands():
    guard, saved = failing_guard()
    before = guard.state(), guard.reason
    assert observe(guard, [3.0, NAN], first=104) == [ROLL_BACK, ROLL_BACK]
    assert guard.step == 103
    assert (guard.state(), guard.reason) == before
    guard.rolled_back(80, saved)
    assert guard.sound
    assert observe(guard, [3.0], first=81) == [OK]


def test_rolled_back__window__goes_back_with_the_checkpoint_and_rollbacks_do_not():
    guard, saved = failing_guard()
    guard.rolled_back(80, saved)
    state = guard.state()
    assert state["losses"] == saved["losses"]
    assert state["step"] == 80
    assert saved["rollbacks"] == []
    (rollback,) = state["rollbacks"]
    assert rollback[:2] == [103, 80]


def test_rolled_back__to_the_start__knows_no_losses():
    guard, _ = failing_guard()
    guard.rolled_back(0)
    assert guard.state()["losses"] == []
    assert observe(guard, [9.0], first=1) == [OK]
    assert guard.limit is None


def test_rolled_back__again_and_again_to_the_same_step__stops():
    guard, saved = failing_guard(max_rollbacks=2)
    for _ in range(2):
        guard.rolled_back(80, saved)
        verdicts = observe(guard, [30.0] * 3, first=81)
    assert verdicts == [SPIKE, SPIKE, STOP]
    assert "max_rollbacks 2" in guard.reason


def test_observe__without_rollbacks__stops_at_the_first_failure():
    guard, _ = failing_guard(max_rollbacks=0)
    assert observe(guard, [3.0], first=104) == [STOP]


def rollbacks_after(checkpoint):
    guard, saved = failing_guard()
    guard.rolled_back(80, saved)
    observe(guard, noisy(checkpoint - 80, seed=2), first=81)
    guard.saved(checkpoint)
    return guard.state()


def test_saved__checkpoint_a_window_beyond_the_failure__forgives_and_one_before_does_not():
    assert len(rollbacks_after(103 + 127)["rollbacks"]) == 1
    assert rollbacks_after(103 + 128)["rollbacks"] == []
    assert rollbacks_after(103 + 128)["forgiven"] == 1


def test_saved__after_a_failure_further_back__the_farthest_one_counts():
    guard, saved = failing_guard(max_rollbacks=5)
    guard.rolled_back(80, saved)
    observe(guard, [30.0] * 3, first=81)  # fails at 83 now
    guard.rolled_back(80, saved)
    guard.saved(83 + 128)
    assert len(guard.state()["rollbacks"]) == 2
    guard.saved(103 + 128)
    assert guard.state()["rollbacks"] == []


def test_skip_checkpoints__newest_was_no_help__is_passed_over_until_another_is_saved():
    guard, saved = failing_guard()
    assert guard.skip_checkpoints == 0
    guard.rolled_back(80, saved)
    assert guard.skip_checkpoints == 1
    guard.saved(90)
    assert guard.skip_checkpoints == 0


def run(guard, fails, *, steps, every, limit):
    """A training loop: how often it rolled back, and whether it stopped; as the trainer does it."""
    checkpoints, completed, rollbacks = {0: None}, 0, 0
    for executed in range(limit):
        if completed == steps:
            return rollbacks, False
        verdict = guard.observe(record(completed + 1, NAN, skipped=int(fails(executed, completed))))
        if verdict is STOP:
            return rollbacks, True
        if verdict is ROLL_BACK:
            rollbacks += 1
            older = sorted(checkpoints, reverse=True)[guard.skip_checkpoints :]
            completed = older[0] if older else min(checkpoints)
            guard.rolled_back(completed, checkpoints[completed])
            checkpoints = {k: v for k, v in checkpoints.items() if k <= completed}
            continue
        completed += 1
        if every and completed % every == 0 and guard.sound:
            guard.saved(completed)
            checkpoints[completed] = guard.state()
    raise AssertionError(f"the run did not end in {limit} steps")


@pytest.mark.parametrize("every", [0, 1, 3, 50])
@pytest.mark.parametrize("fails", ["always", "from 30", "every 7th executed", "at random"])
def test_run__however_it_fails__ends(fails, every):
    draw = np.random.default_rng(every)
    rule = {
        "always": lambda executed, completed: True,
        "from 30": lambda executed, completed: completed >= 30,
        "every 7th executed": lambda executed, completed: executed % 7 < 2,
        "at random": lambda executed, completed: draw.random() < 0.3,
    }[fails]
    config = GuardConfig(max_skipped=2, max_rollbacks=3, window=10, min_window=2)
    steps = 100
    guard = SoundLoss(config)
    most = config.max_rollbacks * (steps // config.window + 1)
    rollbacks, stopped = run(guard, rule, steps=steps, every=every, limit=(most + 1) * (steps + 2))
    assert rollbacks <= most
    assert stopped or fails in ("every 7th executed", "at random")
    if fails in ("always", "from 30"):
        assert rollbacks == 3


class SoundLoss(Guard):
    """Puts a sound loss where `run` has only NaN."""

    def observe(self, record):
        return super().observe(record if record["skipped"] else {**record, "loss": 1.0})


def test_run__failures_far_apart__are_not_added_up():
    bad = {s + i for s in (40, 240, 440, 640, 840) for i in range(5)}
    guard = SoundLoss(GuardConfig())
    rollbacks, stopped = run(
        guard, lambda executed, completed: executed in bad, steps=1000, every=20, limit=2000
    )
    assert (rollbacks, stopped) == (5, False)


def test_run__failures_that_outrun_no_checkpoint__are_added_up():
    bad = {s + i for s in (140, 540, 940, 1340, 1740) for i in range(5)}
    guard = SoundLoss(GuardConfig())
    rollbacks, stopped = run(
        guard, lambda executed, completed: executed in bad, steps=1000, every=0, limit=9000
    )
    assert (rollbacks, stopped) == (3, True)


def test_run__loss_that_rises_for_good__ends_with_a_report_that_says_what_to_do():
    guard = Guard(GuardConfig())
    step, saved, verdict, seen = 0, None, OK, 0
    losses = np.concatenate([noisy(500), noisy(3000, mean=4.0, seed=1)])
    while verdict is not STOP:
        verdict = guard.observe(record(step + 1, losses[seen]))
        step, seen = step + 1, seen + 1
        if verdict is OK and step % 100 == 0:
            guard.saved(step)
            saved = guard.state()
        if verdict is ROLL_BACK:
            guard.rolled_back(saved["step"], saved)  # the data go on
            step = saved["step"]
    assert seen == 500 + 3 * 4
    report = guard.report()
    for part in (
        "Step 503: loss 4.0",
        "from step 503 to 500",
        "max_rollbacks 3 is used up",
        "optim.learning_rate",
        "the data became harder, raise guard.sigma",
    ):
        assert part in report
    assert "none was applied" not in report
    assert report.count("to 500") == 3


def test_report__failure_that_was_not_finite__says_nothing_of_harder_data():
    guard = Guard(GuardConfig(max_skipped=1, max_rollbacks=0))
    observe(guard, [1.0, NAN])
    assert guard.report().startswith("Step 2: update skipped as not finite (loss nan")
    assert "harder" not in guard.report()
    assert "Rolled back" not in guard.report()
    assert "none was applied" in guard.report()


# What it remembers.

STEP = st.sampled_from([1.0, 1.01, 1.3, 5.0, NAN, math.inf, "save"])


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=80), st.integers(0, 79))
def test_restore__anywhere_in_a_run__goes_on_as_if_never_stopped(steps, cut):
    config = GuardConfig(
        max_skipped=2, max_spikes=2, window=8, min_window=3, max_rollbacks=3, sigma=3
    )
    guard, step, checkpoint = Guard(config), 0, (0, None)
    twin, seen = None, []
    for index, what in enumerate(steps):
        if index == cut % len(steps):
            twin = Guard.restore(config, json.loads(json.dumps(guard.state(), allow_nan=False)))
        guards = [guard] if twin is None else [guard, twin]
        if what == "save":
            for each in guards:
                each.saved(step)
            checkpoint = (step, guard.state())
            continue
        step += 1
        skipped = int(isinstance(what, float) and math.isnan(what))
        verdicts = [each.observe(record(step, what, skipped=skipped)) for each in guards]
        if verdicts[0] is ROLL_BACK:
            for each in guards:
                each.rolled_back(*checkpoint)
            step = checkpoint[0]
        if twin is not None:
            seen.append(verdicts)
            assert twin.state() == guard.state()
            assert (twin.reason, twin.limit) == (guard.reason, guard.limit)
        if verdicts[0] is STOP:
            break
    assert all(mine == its for mine, its in seen)


def test_state__of_a_run_with_a_past__is_that_of_the_restored_guard():
    guard, saved = failing_guard()
    guard.rolled_back(80, saved)
    observe(guard, noisy(160, seed=2), first=81)
    guard.saved(240)  # forgives
    observe(guard, [30.0] * 3, first=241)
    guard.rolled_back(240, guard.state())
    observe(guard, [NAN, 30.0], first=241)
    state = guard.state()
    assert all(state.values())
    assert Guard.restore(GuardConfig(), state).state() == state


def test_state__of_a_long_run__does_not_grow():
    guard = Guard(GuardConfig())
    observe(guard, noisy(128))
    size = len(json.dumps(guard.state()))
    observe(guard, noisy(2000), first=129)
    assert len(json.dumps(guard.state())) < 1.1 * size


def test_restore__smaller_window__keeps_the_newest_losses():
    guard = Guard(GuardConfig())
    losses = noisy(200)
    observe(guard, losses)
    smaller = Guard.restore(GuardConfig(window=70, min_window=64), guard.state())
    assert smaller.state()["losses"] == list(losses[-70:])


@pytest.mark.parametrize(
    "change", [{"losses": [1.0, NAN]}, {"losses": None}, {"rollbacks": [[1]]}, {"skipped": "x"}]
)
def test_restore__what_is_no_state__is_refused(change):
    state = {**Guard(GuardConfig()).state(), **change}
    with pytest.raises(UserError, match="The guard cannot be restored"):
        Guard.restore(GuardConfig(), state)


@pytest.mark.parametrize("key", sorted(Guard(GuardConfig()).state()))
def test_restore__part_that_is_missing__is_refused(key):
    state = Guard(GuardConfig()).state()
    del state[key]
    with pytest.raises(UserError, match=key):
        Guard.restore(GuardConfig(), state)


@pytest.mark.parametrize("step", [4, 5])
def test_observe__step_that_came_before__is_refused(step):
    guard = Guard(GuardConfig())
    observe(guard, [1.0] * 5)
    with pytest.raises(ValueError, match=f"step {step} after step 5"):
        guard.observe(record(step, 1.0))


def test_import__of_guard_and_promotion__loads_no_jax():
    code = (
        "import sys, lowprec_jax.training.guard, lowprec_jax.training.promotion\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
