"""A resumed run is the run that was never stopped; a checkpoint that does not fit is refused."""

import json
import warnings
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.training import checkpoint
from lowprec_jax.training.checkpoint import Checkpoints
from lowprec_jax.training.loop import train
from training.helpers import assert_same_bits, start, tiny_config


def stored(run: Path, step: int):
    """The arrays of a checkpoint, read with Orbax alone; it warns that it has to guess a layout."""
    with ocp.StandardCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpointer.restore((run / "checkpoints" / str(step) / "state").absolute())


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_times(found: list[dict]) -> list[dict]:
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in times} for record in found]


def test_resume__final_state__is_that_of_the_straight_run_bit_for_bit(runs):
    expected, actual = stored(runs.straight, 8), stored(runs.resumed, 8)
    assert_same_bits(actual, expected)
    assert expected.keys() == {"params", "scaling", "opt_state", "reduction", "step"}
    assert bool(expected["scaling"]) == (runs.config.precision.recipe != "none")


def test_resume__training_changes_the_state__so_that_equality_means_something(runs):
    with pytest.raises(AssertionError):
        assert_same_bits(stored(runs.resumed, 8)["params"], stored(runs.resumed, 4)["params"])


def test_resume__logged_metrics__are_those_of_the_straight_run(runs):
    assert without_times(records(runs.resumed)) == without_times(records(runs.straight))


def test_resume__summary__is_that_of_the_straight_run(runs):
    for name in ("steps", "validation_loss", "best_validation_loss", "recipe", "gemms"):
        assert runs.resumed_summary[name] == runs.summary[name], name
    samples = [(run / "samples.txt").read_bytes() for run in (runs.straight, runs.resumed)]
    assert samples[0] == samples[1]


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
        ({"model": {"width": 48, "num_heads": 2}}, "step 4 in .* does not fit this run"),
        ({"model": {"mlp": "gelu"}}, "step 4 in .* does not fit this run"),
        ({"recipe": "none"}, "step 4 in .* does not fit this run"),
        ({"precision": {"history_length": 8}}, "step 4 in .* does not fit this run"),
        ({"steps": 4}, "has completed 4 of 4 steps. Give --steps more than 4"),
        ({"resume": False}, "holds a run already. Add --resume True"),
    ],
    ids=["width", "mlp", "recipe", "history", "finished", "no_resume"],
)
def test_resume__what_does_not_fit__is_refused_and_changes_nothing(
    changes, message, fp8_run, run_config
):
    before = contents(fp8_run)
    changes = {"steps": 8, "resume": True, **changes}
    with pytest.raises(UserError, match=message) as caught:
        train(run_config(fp8_run, plots=False, sample_tokens=0, **changes))
    assert str(fp8_run) in str(caught.value)
    assert contents(fp8_run) == before


def test_resume__killed_before_the_first_checkpoint__says_how_to_start_anew(run_config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n', encoding="utf-8")
    with pytest.raises(UserError, match="No checkpoint to resume from") as caught:
        train(run_config(run, recipe="none", resume=True))
    assert f"delete {run}" in str(caught.value)


def test_resume__checkpoint_of_another_format__is_refused(fp8_run, run_config, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match=r"has format 2; this version .* reads format 3"):
        train(run_config(fp8_run, plots=False, sample_tokens=0, steps=8, resume=True))


def test_checkpoints__only_the_newest__stay(fp8_run):
    names = sorted(p.name for p in (fp8_run / "checkpoints").iterdir() if p.name.isdigit())
    assert names == ["2", "4"]  # keep_checkpoints is 2


def test_checkpoints__a_step_saved_twice__is_written_once(fp8_run, tmp_path):
    state = start(tiny_config(recipe="none"))
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(state)
    assert [p.name for p in folder.iterdir()] == ["0"]
