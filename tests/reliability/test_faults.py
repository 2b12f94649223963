"""A step that goes wrong: what it must not touch, and how the run gets over it.

Faults come from outside: a token that is not in the vocabulary makes one activation NaN; a weight
of the running state is multiplied by 2**10.
"""

import math
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from training.helpers import events_of, metrics_of

from lowprec_jax import data
from lowprec_jax.errors import TrainingFailedError
from lowprec_jax.recipes import Role
from lowprec_jax.state import sites
from lowprec_jax.training.loop import train
from lowprec_jax.training.trainer import Trainer

pytestmark = pytest.mark.reliability
OUTPUTS = {"plots": False, "sample_tokens": 0}


@pytest.fixture
def nan_in_batches(monkeypatch):
    """One token of some batches, by number, is not in the vocabulary: its embedding is NaN."""

    def install(*numbers: int) -> None:
        plain = data.Batches.batch

        def batch(self, number, rows=slice(None)):
            inputs, targets = plain(self, number, rows)
            if number in numbers:
                inputs = inputs.copy()
                inputs[0, 3] = 10**6
            return inputs, targets

        monkeypatch.setattr(data.Batches, "batch", batch)

    return install


def histories(state) -> list[np.ndarray]:
    return [np.asarray(site["amax_history"]) for _, site in sites(state.scaling)]


@pytest.fixture
def states(monkeypatch):
    """The state after every step, on the host."""
    seen = {}
    plain = Trainer._step

    def step(self):
        plain(self)
        seen[self.completed] = jax.device_get(self.state)

    monkeypatch.setattr(Trainer, "_step", step)
    return seen


def test_nan__in_one_activation__costs_one_step_and_poisons_nothing(
    run_config, tmp_path, nan_in_batches, states
):
    run = tmp_path / "run"
    nan_in_batches(4)  # step 5
    train(run_config(run, steps=8, checkpoint_every=1, keep_checkpoints=9, **OUTPUTS))
    losses = {r["step"]: r for r in metrics_of(run) if "loss" in r}
    assert [losses[step]["skipped"] for step in range(1, 9)] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert losses[5]["loss"] is None
    assert losses[5]["nonfinite"] > 0
    # No update: parameters and optimizer are those of step 4, bit for bit.
    kept = (states[4].params, states[4].opt_state), (states[5].params, states[5].opt_state)
    assert all(map(np.array_equal, *map(jax.tree.leaves, kept)))
    # The broken amaxes are dropped; at the next step every history moves again.
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[5]))
    for before, after in zip(histories(states[4]), histories(states[5]), strict=True):
        np.testing.assert_array_equal(after[..., Role.LHS, :], before[..., Role.LHS, :])
    for before, after in zip(histories(states[5]), histories(states[6]), strict=True):
        assert (after[..., 1:] == before[..., :-1]).all()
    assert losses[6]["scale_age"] < losses[5]["scale_age"] + 2
    [skip] = events_of(run, "skip")
    assert skip["step"] == 5
    # The step after the skipped one is saved, the skipped one is not; nothing saved is bad.
    saved = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert saved == [1, 2, 3, 4, 6, 7, 8]
    for step in saved:
        with ocp.StandardCheckpointer() as checkpointer, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has to guess where the arrays go
            arrays = checkpointer.restore((run / "checkpoints" / str(step) / "state").absolute())
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in arrays.values())


def test_nan__again_and_again__rolls_back_past_the_bad_data_and_finishes(
    run_config, tmp_path, nan_in_batches
):
    """Batches 5 to 7 are bad: three skips in a row, then the run goes on with batch 8."""
    run = tmp_path / "run"
    nan_in_batches(5, 6, 7)
    guard = {"max_skipped": 3, "promote_steps": 3}
    train(run_config(run, steps=12, guard=guard, **OUTPUTS))
    [rollback] = events_of(run, "rollback")
    assert (rollback["step"], rollback["to"]) == (8, 4)
    assert rollback["operands"]
    [promotion, *_] = events_of(run, "promotion")
    assert promotion["until"] == 7
    assert [e["step"] for e in events_of(run, "demotion")] == [7]
    records = [r for r in metrics_of(run) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert not any(r["skipped"] for r in records)


def test_nan__in_all_data__stops_with_a_report(run_config, tmp_path, nan_in_batches):
    run = tmp_path / "run"
    nan_in_batches(*range(2, 100))
    guard = {"max_skipped": 2, "max_rollbacks": 2}
    with pytest.raises(
        TrainingFailedError, match=r"Rolled back without lasting progress"
    ) as caught:
        train(run_config(run, steps=40, guard=guard, plots=True, sample_tokens=0))
    assert "optim.learning_rate" in str(caught.value)
    assert len(events_of(run, "rollback")) == 2
    assert events_of(run, "stop")
    assert (run / "report.html").exists()


def scale_a_weight(monkeypatch, at_step: int, factor: float = 2.0**10) -> None:
    """Before a step, once: a kernel of the running state is multiplied."""
    plain, done = Trainer._step, []

    def step(self):
        if self.completed + 1 == at_step and not done:
            done.append(True)
            params = jax.tree.map(lambda x: x, self.state.params)
            params["blocks"]["mlp"]["down"]["kernel"] *= np.float32(factor)
            self.state = self.state._replace(params=params)
        plain(self)

    monkeypatch.setattr(Trainer, "_step", step)


def test_weight_times_1024__is_detected_and_rolled_back__and_the_loss_is_that_of_a_clean_run(
    run_config, tmp_path, monkeypatch, request
):
    """Final losses are over the whole validation split, whose text is like that of training."""
    if not request.config.getoption("--full-matrix"):
        pytest.skip("nightly: --full-matrix")
    options = {"steps": 400, "eval_every": 0, "eval_windows": None, "checkpoint_every": 20}
    options |= {"batch_size": 32, "guard": {"promote_steps": 30}, **OUTPUTS}
    clean = train(run_config(tmp_path / "clean", **options))["validation_loss"]
    scale_a_weight(monkeypatch, 231)
    hit = train(run_config(tmp_path / "hit", **options))["validation_loss"]
    [rollback] = events_of(tmp_path / "hit", "rollback")
    assert 220 == rollback["to"] < rollback["step"] <= 231 + 4
    records = [r for r in metrics_of(tmp_path / "hit") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 401))
    # What is clipped when the guard acts is in high precision for a while, and only that. It is the
    # layer after the broken one, whose own scale has followed the weight by then.
    [promotion] = events_of(tmp_path / "hit", "promotion")
    assert promotion["paths"] == ["blocks/attention/qkv"]
    during, after = (records[step - 1]["operands"] for step in (250, 275))
    assert len(after) - len(during) == 2 * len(Role)
    print(f"validation {hit:.4f}, clean {clean:.4f} ({hit / clean - 1:+.2%})")
    assert math.isclose(hit, clean, rel_tol=0.01)
