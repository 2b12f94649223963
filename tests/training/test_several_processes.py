"""Two processes of four devices train as one of eight does: losses, files, checkpoints, the end.

Real runs of ``train``, each made once: alone in this process; in two through the launcher; and in
two that share the parameters (FSDP), one of which is killed. Recipe "none", as FP8 is chaotic: the
same comparison with FP8, against its noise floor, is ``python -m benchmarks.soak processes``.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lowprec_jax.cli.environment import emulate_devices
from lowprec_jax.cli.launch import run_launch
from lowprec_jax.config_text import dump_config
from lowprec_jax.training.config import MeshConfig, TrainConfig
from lowprec_jax.training.loop import train
from lowprec_jax.training.message_line import free_port
from lowprec_jax.training.process_settings import EXIT_PEER_LOST, PEER_LOST_PREFIX
from training.helpers import tiny_config

STEPS, SAVE_EVERY = 20, 10
FSDP = MeshConfig(data=2, fsdp=4)


@pytest.fixture(scope="module", autouse=True)
def every_process_compiles():
    """Only process 0 writes to a cache of programs: without it the processes are alike, as in use.

    JAX reads the variable when it starts, so that only processes which a test starts obey it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
        yield


@pytest.fixture(scope="module")
def config(text_file) -> TrainConfig:
    """Twenty steps on eight devices; the learning rate does not depend on their number."""
    return tiny_config(
        recipe="none",
        devices=8,
        steps=STEPS,
        source=str(text_file),
        optim={"final_fraction": 1.0},
        **{"eval_every": 10, "eval_windows": 9, "checkpoint_every": SAVE_EVERY},
        **{"sample_tokens": 4, "sample_prompt": "line"},
    )


def words(config: TrainConfig) -> list[str]:
    """The subcommand of a run; its config is written beside its directory."""
    path = Path(config.run_dir).with_suffix(".yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    return ["train", "--config", str(path)]


def train_in_two_processes(config: TrainConfig) -> None:
    assert run_launch(["--processes", "2", "--devices", "4", "--", *words(config)]) == 0


@pytest.fixture(scope="module")
def single(config, tmp_path_factory) -> Path:
    """The directory of a run in one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    train(dataclasses.replace(config, run_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def double(config, tmp_path_factory) -> Path:
    """The directory of the same run in two processes."""
    folder = tmp_path_factory.mktemp("double") / "run"
    train_in_two_processes(dataclasses.replace(config, run_dir=str(folder)))
    return folder


class Killed(NamedTuple):
    """What is left when process 1 is killed: the directory, and how process 0 ended."""

    folder: Path
    losses: dict[int, float]
    seconds: float
    code: int
    stderr: str


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory) -> Killed:
    """An FSDP run of which process 1 is killed. No launcher is there to end it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    endless = dataclasses.replace(
        config, steps=1_000_000, eval_every=0, mesh=FSDP, run_dir=str(folder)
    )
    with processes(words(endless)) as (first, second):
        wait_for_step(STEPS + 5, folder, first)
        second.send_signal(signal.SIGKILL)
        start = time.monotonic()
        stderr = first.communicate(timeout=120)[1]
        seconds = time.monotonic() - start
    print(f"process 0 ended {seconds:.2f} s after process 1 was killed")
    return Killed(folder, losses_of(folder), seconds, first.returncode, stderr)


@contextlib.contextmanager
def processes(command: list[str]) -> Iterator[list[subprocess.Popen]]:
    """Two connected processes of four devices; none outlives the context."""
    common = {**os.environ, "LOWPREC_COORDINATOR": f"127.0.0.1:{free_port()}"}
    emulate_devices(4, common)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "lowprec_jax", *command],
            env={**common, "LOWPREC_NUM_PROCESSES": "2", "LOWPREC_PROCESS_ID": str(index)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def wait_for_step(step: int, folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and step in losses_of(folder):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not logged")


def records_of(folder: Path) -> list[dict]:
    """The lines of a log; a last one that is not whole is left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses_of(folder: Path) -> dict[int, float]:
    """The loss of every step."""
    return {record["step"]: record["loss"] for record in records_of(folder) if "loss" in record}


def assert_same_losses(actual: dict[int, float], expected: dict[int, float], first: int = 1):
    """From step `first` to the last that both have; 1e-6 (2.1e-7 was the most measured)."""
    steps = range(first, min(len(actual), len(expected)) + 1)
    assert len(steps) > 1
    np.testing.assert_allclose(
        [actual[step] for step in steps], [expected[step] for step in steps], rtol=1e-6
    )


def resumable(folder: Path, tmp_path: Path) -> Path:
    """A copy of a finished run as if it had been killed before its last checkpoint."""
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    return copy


def test_two_processes__data_parallel__losses_are_those_of_one(single, double):
    expected = losses_of(single)
    assert len(expected) == STEPS
    assert expected[STEPS] < 0.5 * expected[1]
    assert_same_losses(losses_of(double), expected)


def test_two_processes__fsdp__losses_are_those_of_one(single, killed):
    assert_same_losses(killed.losses, losses_of(single))


def test_two_processes__run_directory__has_the_files_of_one(single, double):
    def files(folder: Path) -> list[str]:
        """All but the inside of checkpoints, where each process writes its part."""
        found = (path.relative_to(folder) for path in folder.rglob("*"))
        return sorted(
            "events" if "tfevents" in path.name else str(path)
            for path in found
            if path.parts[0] != "checkpoints" or len(path.parts) <= 3
        )

    assert files(double) == files(single)
    assert "checkpoints/10/state" in files(single)
    assert {"samples.txt", "summary.json", "tokenizer.json"} <= set(files(single))
    lines = [[(r["step"], "loss" in r) for r in records_of(f)] for f in (single, double)]
    assert lines[0] == lines[1]  # each once: one process writes
    for name in ("data_card.json", "tokenizer.json"):
        assert (double / name).read_bytes() == (single / name).read_bytes()


def test_two_processes__validation_losses__are_those_of_one(single, double):
    def read(folder: Path) -> list[float]:
        return [r["validation_loss"] for r in records_of(folder) if "validation_loss" in r]

    assert len(read(single)) == 2
    np.testing.assert_allclose(read(double), read(single), rtol=1e-6)


def test_two_processes__checkpoint_of_one__goes_on_as_if_never_stopped(config, single, tmp_path):
    folder = resumable(single, tmp_path)
    train_in_two_processes(
        dataclasses.replace(config, run_dir=str(folder), resume=True, sample_tokens=0)
    )
    assert_same_losses(losses_of(folder), losses_of(single), first=SAVE_EVERY + 1)


def test_one_process__checkpoint_of_two__goes_on_as_if_never_stopped(config, double, tmp_path):
    folder = resumable(double, tmp_path)
    train(dataclasses.replace(config, run_dir=str(folder), resume=True, sample_tokens=0))
    assert_same_losses(losses_of(folder), losses_of(double), first=SAVE_EVERY + 1)


def test_one_process__sharded_checkpoint_of_a_killed_run__goes_on(config, killed, tmp_path):
    folder = shutil.copytree(killed.folder, tmp_path / "run")
    saved = max(
        int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()
    )
    last = max(killed.losses)
    train(
        dataclasses.replace(config, run_dir=str(folder), resume=True, steps=last, sample_tokens=0)
    )
    assert_same_losses(losses_of(folder), killed.losses, first=saved + 1)


def test_two_processes__one_is_killed__the_other_says_so_and_ends_within_a_minute(killed):
    assert killed.seconds < 60
    assert killed.code == EXIT_PEER_LOST
    assert f"{PEER_LOST_PREFIX}process 1 ended too early: it was killed" in killed.stderr
    assert "--resume continues from the newest checkpoint" in killed.stderr
    assert "Traceback" not in killed.stderr
