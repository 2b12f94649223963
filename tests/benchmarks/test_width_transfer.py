"""Which learning rate the study of widths calls best, and what a run that failed counts as."""

import json
import math
import subprocess

import pytest

from benchmarks import width_transfer

RATES = ("--learning-rates", "0.01", "0.02")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs that do not train: their loss is |log2(rate / 0.02)|, and the guard stops width 64."""
    commands, run_program = [], subprocess.run

    def run(command, **options):
        if "train" not in command:  # the machine is described by programs too
            return run_program(command, **options)
        assert options["check"]
        values = dict(zip(command[4::2], command[5::2], strict=True))
        commands.append(values)
        if values["--model.width"] == "64":
            raise subprocess.CalledProcessError(5, command)
        loss = abs(math.log2(float(values["--optim.learning_rate"]) / 0.02))
        path = tmp_path / values["--name"]
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps({"validation_loss": loss}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def _run(tmp_path, *words):
    text = tmp_path / "t.txt"
    text.write_text("to be or not to be")
    return width_transfer.main(["--source", str(text), "--out", str(tmp_path), *RATES, *words])


def _study(tmp_path, *words):
    assert _run(tmp_path, *words) == 0
    return json.loads((tmp_path / "width_transfer.json").read_text())["losses"]


def test_study__two_rates__names_the_best_and_keeps_finished_runs(runs, tmp_path, capsys):
    losses = _study(tmp_path, "--widths", "32", "96")
    assert losses == {"32": {"0.01": 1.0, "0.02": 0.0}, "96": {"0.01": 1.0, "0.02": 0.0}}
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-2:]] == ["0.02"] * 2
    assert [(run["--model.num_heads"], run["--model.mlp_width"]) for run in runs[::2]] == [
        ("1", "88"),
        ("3", "264"),
    ]
    _study(tmp_path, "--widths", "32", "96")
    assert len(runs) == 4


def test_study__run_stopped_by_its_guard__has_no_loss_and_is_tried_again(runs, tmp_path):
    for _ in range(2):
        losses = _study(tmp_path, "--widths", "64")
    assert all(math.isnan(loss) for loss in losses["64"].values())
    assert len(runs) == 4


def test_study__folder_of_other_runs__is_refused(runs, tmp_path, capsys):
    _study(tmp_path, "--widths", "32")
    assert _run(tmp_path, "--widths", "32", "--steps", "7") == 2
    assert "holds other runs" in capsys.readouterr().err
    assert len(runs) == 2
