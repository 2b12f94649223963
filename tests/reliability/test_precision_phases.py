"""Switches of precision inside one run: no jump of the loss; a resume at a switch is exact."""

import dataclasses

import numpy as np
import pytest
from training.helpers import events_of, metrics_of, tiny_config

from lowprec_jax.training.config import PhaseConfig, RuleConfig
from lowprec_jax.training.loop import train
from lowprec_jax.training.phases import precision_at

pytestmark = pytest.mark.reliability
OUTPUTS = {"plots": False, "sample_tokens": 0, "eval_every": 0}


def phases(first: int, second: int):
    return (PhaseConfig(step=first, recipe="fp8_delayed"), PhaseConfig(step=second, recipe="none"))


def losses(run) -> np.ndarray:
    return np.array([r["loss"] for r in metrics_of(run) if "loss" in r])


def test_precision_at__every_step__is_that_of_the_last_phase_that_began():
    rules = (RuleConfig(path=".*/mlp/.*", recipe="fp8_current"),)
    config = tiny_config(
        recipe="none",
        steps=100,
        precision={
            "phases": (
                PhaseConfig(fraction=0.1, recipe="fp8_delayed"),
                PhaseConfig(step=50, rules=rules),
            )
        },
    )
    found = [precision_at(config, completed) for completed in (0, 9, 10, 49, 50, 99)]
    assert [p.recipe for p in found] == ["none"] * 2 + ["fp8_delayed"] * 2 + ["none"] * 2
    assert [p.rules for p in found] == [()] * 4 + [rules] * 2
    assert precision_at(config, 10) == precision_at(config, 49)  # one program


def test_precision_at__promoted_layers__come_before_all_rules():
    config = tiny_config(precision={"rules": (RuleConfig(path="blocks/.*", recipe="fp8_current"),)})
    found = precision_at(config, 3, {"blocks/mlp/down"})
    assert [(rule.path, rule.recipe) for rule in found.rules] == [
        ("blocks/mlp/down", "none"),
        ("blocks/.*", "fp8_current"),
    ]


def test_phases__resumed_at_a_switch__are_the_straight_run_bit_for_bit(run_config, tmp_path):
    """Stops exactly at both switches: after step 3 and after step 6 of 8."""
    options = {"recipe": "none", "precision": {"phases": phases(3, 6)}, **OUTPUTS}
    straight = run_config(tmp_path / "straight", checkpoint_every=3, **options)
    train(straight)
    kinds = [(e["step"], e["recipe"]) for e in events_of(tmp_path / "straight", "phase")]
    assert kinds == [(3, "fp8_delayed"), (6, "none")]
    recipes = [r["recipe"] for r in metrics_of(tmp_path / "straight") if "loss" in r]
    assert recipes == ["none"] * 3 + ["fp8_delayed"] * 3 + ["none"] * 2
    for stop in (3, 6):
        stopped_at(tmp_path / f"{stop}", straight, stop)
        assert metrics_of(tmp_path / f"{stop}") == metrics_of(tmp_path / "straight")


def stopped_at(run, config, step: int) -> None:
    """The run of a config that is stopped by a signal after a step, and resumed."""
    import os
    import signal

    from lowprec_jax.training.trainer import Trainer

    plain = Trainer._step

    def stopping(self):
        plain(self)
        if self.completed == step:
            os.kill(os.getpid(), signal.SIGTERM)

    config = dataclasses.replace(config, run_dir=str(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        assert train(config) == {"steps": step, "stopped_by": "SIGTERM"}
    train(dataclasses.replace(config, resume=True))


def test_phases__hp_forward_finish__trains_and_counts_two_products_less(run_config, tmp_path):
    finish = (PhaseConfig(step=4, recipe="fp8_delayed_hp_forward"),)
    train(run_config(tmp_path / "run", precision={"phases": finish}, **OUTPUTS))
    values = losses(tmp_path / "run")
    assert np.isfinite(values).all()
    assert values[-1] < values[0] - 0.3


def test_phases__switches__make_no_jump(run_config, tmp_path, request):
    """bf16, FP8, bf16: no step's loss differs from that of a run without switches by 3 sigma.

    sigma: the spread of the steps of the run without switches around their running mean, which is
    what a jump has to be seen against.
    """
    if not request.config.getoption("--full-matrix"):
        pytest.skip("nightly: --full-matrix")
    first, second, steps = 100, 200, 300
    options = {"recipe": "none", "steps": steps, "checkpoint_every": 0, "batch_size": 16, **OUTPUTS}
    options["model"] = {"compute_dtype": "bfloat16"}
    train(run_config(tmp_path / "without", **options))
    options["precision"] = {"phases": phases(first, second)}
    train(run_config(tmp_path / "with", **options))
    expected, actual = losses(tmp_path / "without"), losses(tmp_path / "with")
    kernel = np.ones(9) / 9
    around = expected - np.convolve(np.pad(expected, 4, mode="edge"), kernel, "valid")
    sigma = around[first // 2 :].std()
    np.testing.assert_array_equal(actual[:first], expected[:first])
    assert np.abs(actual - expected).max() < 3 * sigma
    print(f"sigma {sigma:.4f} nats, largest difference {np.abs(actual - expected).max():.4f}")
