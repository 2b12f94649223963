"""Real runs of eight steps, made once: straight, and killed after step 4 then resumed."""

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.loop import train
from training.helpers import tiny_config

TEXT = "".join(f"line {i} is {i * i % 97} and {i**3 % 89}.\n" for i in range(600))


class Runs(NamedTuple):
    """A run that was never stopped, and one that was, in their directories."""

    config: TrainConfig
    straight: Path
    summary: dict
    resumed: Path
    resumed_summary: dict


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run_config(text_file):
    """A config of eight steps with every output, checkpoints at 4 and 8."""

    def make(run_dir: Path, **changes) -> TrainConfig:
        outputs = {"plots": True, "sample_tokens": 4, "sample_prompt": "line"}
        every = {"eval_every": 2, "eval_windows": 9, "checkpoint_every": 4}
        changes = {"steps": 8, **outputs, **every, **changes}
        return tiny_config(source=str(text_file), run_dir=str(run_dir), **changes)

    return make


@pytest.fixture(scope="session", params=["fp8_delayed", "none"])
def runs(request, run_config, tmp_path_factory) -> Runs:
    """A straight run; and what it left when killed while step 7 was logged, resumed."""
    folder = tmp_path_factory.mktemp(request.param)
    config = run_config(folder / "straight", recipe=request.param)
    summary = train(config)
    killed = shutil.copytree(folder / "straight", folder / "resumed")
    shutil.rmtree(killed / "checkpoints" / "8")
    for name in ("summary.json", "samples.txt", "loss.png", "health.png"):
        (killed / name).unlink(missing_ok=True)
    lines = (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"step": 7,' in line)
    (killed / "metrics.jsonl").write_text("".join(lines[:cut]) + lines[cut][:30], encoding="utf-8")
    again = dataclasses.replace(config, run_dir=str(killed), resume=True)
    return Runs(config, folder / "straight", summary, killed, train(again))
