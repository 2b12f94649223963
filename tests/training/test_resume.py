"""A resumed run is the run that was never stopped; a checkpoint that does not fit is refused."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from lowprec_jax.config_text import config_to_dict
from lowprec_jax.errors import UserError
from lowprec_jax.training.checkpoint import Checkpoints
from lowprec_jax.training.config import PrecisionConfig, TrainConfig
from lowprec_jax.training.loop import train
from lowprec_jax.training.resume import changes
from training.helpers import assert_same_bits, events_of, metrics_of

pytestmark = pytest.mark.reliability


def stored(run: Path, step: int):
    """The arrays of a checkpoint, read with Orbax alone; it warns that it has to guess a layout."""
    with ocp.StandardCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpointer.restore((run / "checkpoints" / str(step) / "state").absolute())


def test_resume__final_state__is_that_of_the_straight_run_bit_for_bit(runs):
    expected, actual = stored(runs.straight, 8), stored(runs.resumed, 8)
    assert_same_bits(actual, expected)
    groups = {name.split("/")[0] for name in expected}
    scaling = {"scaling"} if runs.config.precision.recipe != "none" else set()
    assert groups == {"params", "opt_state", "step"} | scaling


def test_resume__training_changes_the_state__so_that_equality_means_something(runs):
    with pytest.raises(AssertionError):
        assert_same_bits(stored(runs.resumed, 8), stored(runs.resumed, 6))


def test_resume__logged_metrics__are_those_of_the_straight_run(runs):
    assert metrics_of(runs.resumed) == metrics_of(runs.straight)


def test_resume__summary__is_that_of_the_straight_run(runs):
    for name in ("steps", "validation_loss", "best_validation_loss", "recipe", "gemms"):
        assert runs.resumed_summary[name] == runs.summary[name], name
    samples = [(run / "samples.txt").read_bytes() for run in (runs.straight, runs.resumed)]
    assert samples[0] == samples[1]


def test_changes__option_that_an_older_checkpoint_lacks__had_its_default():
    before = config_to_dict(TrainConfig())
    del before["model"]["parametrization"], before["precision"]["target"]
    assert changes(before, TrainConfig()) == ([], [])
    other = dataclasses.replace(TrainConfig(), precision=PrecisionConfig(target="cpu"))
    assert changes(before, other).decisive == ["precision.target: None, now cpu"]


@pytest.fixture(scope="module")
def fp8_run(run_config, tmp_path_factory):
    """A directory with checkpoints at 2 and 4 of 8 steps, and what it holds."""
    run = tmp_path_factory.mktemp("fp8") / "run"
    config = run_config(run, steps=4, checkpoint_every=2, plots=False, sample_tokens=0)
    train(config)
    return run


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in sorted(run.rglob("*")) if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"width": 48}}, "made with other options: model.width: 32, now 48"),
        ({"recipe": "none"}, "precision.recipe: fp8_delayed, now none"),
        ({"seed": 1}, "seed: 0, now 1"),
        ({"steps": 4}, "has completed 4 of 4 steps. Give --steps more than 4"),
        ({"resume": False}, "holds a run already. Add --resume True"),
        (
            {"model": {"width": 48}, "allow_changes": True},
            r"does not fit this run: params/.* is float32.* there and float32.* here",
        ),
    ],
    ids=["width", "recipe", "seed", "finished", "no_resume", "fits_not"],
)
def test_resume__what_does_not_fit__is_refused_and_changes_nothing(
    changes, message, fp8_run, run_config
):
    before = contents(fp8_run)
    changes = {"steps": 8, "resume": True, **changes}
    with pytest.raises(UserError, match=message):
        train(run_config(fp8_run, plots=False, sample_tokens=0, **changes))
    assert contents(fp8_run) == before


def test_resume__killed_before_the_first_checkpoint__says_how_to_start_anew(run_config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n', encoding="utf-8")
    with pytest.raises(UserError, match="No checkpoint to resume from") as caught:
        train(run_config(run, recipe="none", resume=True))
    assert f"delete {run}" in str(caught.value)


CONVERSIONS = {
    "to_high_precision": ({"recipe": "none"}, "keep no scaling state any more: dropped"),
    "other_recipe": ({"recipe": "fp8_current"}, "precision.recipe: fp8_delayed, now fp8_current"),
    "step_counters": ({"recipe": "mxfp4"}, "precision.recipe: fp8_delayed, now mxfp4"),
    "masters": ({"model": {"param_dtype": "bfloat16"}}, "Parameters go from float32 to bfloat16"),
    "average": ({"optim": {"ema_decay": 0.9}}, "The average of the weights starts from the"),
    "longer": ({}, "steps: 4, now 8"),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_resume__with_other_precision__converts_says_so_and_learns_on(
    case, fp8_run, run_config, tmp_path, capsys
):
    changes, message = CONVERSIONS[case]
    run = shutil.copytree(fp8_run, tmp_path / "run")
    changes = {"steps": 8, "resume": True, "allow_changes": bool(changes), **changes}
    train(run_config(run, plots=False, sample_tokens=0, **changes))
    assert message in capsys.readouterr().out
    losses = [r["loss"] for r in metrics_of(run) if "loss" in r]
    assert len(losses) == 8
    # Without its state a run would start again at 5.5; Adam without moments would jump.
    assert max(losses[4:]) < losses[3] + 0.05
    assert any(message in str(event) for event in events_of(run, "converted", "changed"))


def test_resume__high_precision_to_fp8__calibrates_and_learns_on(run_config, tmp_path, capsys):
    run = tmp_path / "run"
    options = {"plots": False, "sample_tokens": 0}
    train(run_config(run, recipe="none", steps=4, **options))
    train(run_config(run, steps=8, resume=True, allow_changes=True, **options))
    assert "had no scaling state: calibrated before the next step" in capsys.readouterr().out
    records = [r for r in metrics_of(run) if "loss" in r]
    assert ["saturated" in r for r in records] == [False] * 4 + [True] * 4
    assert records[4]["saturated"] == records[4]["underflow"] == 0.0  # scales of its own at once
    assert records[-1]["loss"] < records[3]["loss"]


def test_resume__newest_checkpoint_damaged__goes_on_from_the_one_before(
    fp8_run, run_config, tmp_path, capsys
):
    run = shutil.copytree(fp8_run, tmp_path / "run")
    (run / "checkpoints" / "4" / "manifest.json").write_text("{}")
    train(run_config(run, plots=False, sample_tokens=0, steps=6, resume=True))
    assert "The checkpoint of step 4 is damaged" in capsys.readouterr().out
    assert [r["step"] for r in metrics_of(run) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    [event] = events_of(run, "bad_checkpoint")
    assert "manifest.json" in event["reason"]


def test_resume__newest_checkpoint_damaged__does_not_push_out_the_good_ones(
    fp8_run, run_config, tmp_path
):
    """With one to keep, the damaged one of step 4 must not be it once step 3 is saved."""
    run = shutil.copytree(fp8_run, tmp_path / "run")
    (run / "checkpoints" / "4" / "state" / "_METADATA").write_text("{}")
    options = {"plots": False, "sample_tokens": 0, "keep_checkpoints": 1, "keep_best": False}
    train(run_config(run, steps=3, resume=True, **options))
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.newest().manifest.step == 3
