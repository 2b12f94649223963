"""A whole run: the files it leaves, its numbers, and what it refuses."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import pytest

from lowprec_jax.cli.config_file import load_config
from lowprec_jax.data import load_tokenizer
from lowprec_jax.errors import UserError
from lowprec_jax.training.config import RuleConfig, TrainConfig
from lowprec_jax.training.loop import train
from lowprec_jax.training.run_directory import RunDirectory

FILES = {
    "checkpoints",
    "config.yaml",
    "data_card.json",
    "environment.json",
    "events.jsonl",
    "loss.png",
    "metrics.jsonl",
    "report.html",
    "report.png",
    "samples.txt",
    "summary.json",
    "tokenizer.json",
}


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def is_fp8(runs) -> bool:
    return runs.config.precision.recipe != "none"


def test_run__its_directory__holds_every_file(runs):
    for run in (runs.straight, runs.resumed):
        names = {path.name for path in run.iterdir()} - {"tensorboard"}
        assert names == (FILES | {"health.png"} if is_fp8(runs) else FILES)
        checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
        assert checkpoints == {"6", "8"}  # the newest two; each was the best when it was saved


def test_run__metrics__have_every_step_and_every_evaluation_once(runs):
    for run in (runs.straight, runs.resumed):
        found = records(run)
        assert [r["step"] for r in found if "loss" in r] == list(range(1, 9))
        assert [r["step"] for r in found if "validation_loss" in r] == [2, 4, 6, 8]
        assert len(found) == 12
        for record in found:
            values = [v for v in record.values() if isinstance(v, int | float)]
            assert all(map(math.isfinite, values))
        steps = [r for r in found if "loss" in r]
        assert all(("saturated" in r) == is_fp8(runs) for r in steps)
        assert all(r["seconds"] > 0 and r["tokens_per_second"] > 0 for r in steps)


def test_run__summary__agrees_with_the_metrics(runs):
    validation = [r["validation_loss"] for r in records(runs.straight) if "validation_loss" in r]
    summary = read_json(runs.straight / "summary.json")
    assert summary == runs.summary
    assert summary["steps"] == 8
    assert summary["recipe"] == runs.config.precision.recipe
    assert summary["validation_loss"] == validation[-1]
    assert summary["best_validation_loss"] == min(validation)
    typical = summary["median_step_seconds"]
    tokens = runs.config.batch_size * runs.config.model.context
    assert summary["tokens_per_second"] == pytest.approx(tokens / typical)


def test_run__summary__counts_the_fp8_products(runs):
    """Two layers of four quantized projections, each with three products."""
    gemms = runs.summary["gemms"]
    fp8 = 2 * 4 * 3 if is_fp8(runs) else 0
    assert gemms["native"] + gemms["emulated"] == fp8
    # Scores and values of attention in two layers and the head, forward and backward.
    assert sum(gemms.values()) == 2 * (4 + 2) * 3 + 3


def test_run__losses__fall(runs):
    losses = [r["loss"] for r in records(runs.straight) if "loss" in r]
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < losses[0] - 0.3


def test_run__config_yaml__is_the_config(runs):
    assert load_config(TrainConfig, runs.straight / "config.yaml") == runs.config


def test_run__data_card_and_tokenizer__are_those_of_the_text(runs):
    card = read_json(runs.straight / "data_card.json")
    text = Path(runs.config.data.source).read_text(encoding="utf-8")
    assert card["train"]["characters"] + card["validation"]["characters"] == len(text)
    tokenizer = load_tokenizer(runs.straight / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("line 7")) == "line 7"
    assert read_json(runs.straight / "environment.json")["devices"]


def test_run__plots__are_pictures(runs):
    for path in runs.straight.glob("*.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 500, path
        assert height > 300, path


# What a run refuses.


def test_run__rules_that_exclude_every_layer__are_not_taken_for_fp8(run_config, tmp_path):
    precision = {"rules": (RuleConfig(path=".*", recipe="none"),)}
    config = run_config(tmp_path / "run", precision=precision)
    with pytest.raises(UserError, match="'fp8_delayed' was asked for, but none of the 39 matmuls"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # the corrected command may use it


def test_run__prompt_the_tokenizer_cannot_encode__is_refused_before_training(run_config, tmp_path):
    config = run_config(tmp_path / "run", sample_prompt="€")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="char"))
    with pytest.raises(UserError, match="€"):
        train(config)
    assert not (tmp_path / "run").exists()


# The parts of a run directory.


def test_run_directory__resume_with_nothing_there__is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing_here holds no run to resume"):
        RunDirectory(str(tmp_path / "nothing_here"), resume=True)
    assert not (tmp_path / "nothing_here").exists()


def test_run_directory__a_run_is_there__is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"holds a run already\. Add --resume True") as caught:
        RunDirectory(str(tmp_path), resume=False)
    assert str(tmp_path) in str(caught.value)


def test_run_directory__a_file_is_in_the_way__is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot make the run directory .*file"):
        RunDirectory(str(tmp_path / "file" / "run"), resume=False).make()
