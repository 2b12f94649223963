"""SIGKILL at any instant, also inside a save: what is left is a run that goes on.

Each life of the run is a process that is killed at a random instant after it has begun to train;
every second one inside a save, as soon as arrays without a manifest are seen. Whatever is left must
parse, and the next life must go on from a checkpoint not older than one save interval.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training.helpers import events_of, metrics_of

from lowprec_jax.config_text import dump_config

pytestmark = pytest.mark.reliability
EVERY = 20


def started(config_file: Path, run: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lowprec_jax", "train", "--config", str(config_file)]
    with (run.parent / "output.txt").open("ab") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT)


def logged_steps(run: Path) -> list[int]:
    """The steps in the log; only its last line may be cut off."""
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    records = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == b"" or len(lines[-1]) < 2000
    return [record["step"] for record in records if "loss" in record]


def in_a_save(run: Path) -> bool:
    """Whether arrays are there, or on their way, whose manifest is not."""
    folders = (run / "checkpoints").glob("*/")
    return any(not (folder / "manifest.json").exists() for folder in folders)


def wait_until(condition, process: subprocess.Popen, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def test_sigkill__at_random_instants__every_restart_goes_on(run_config, tmp_path, request):
    kills = 20 if request.config.getoption("--full-matrix") else 2
    run, rng = tmp_path / "run", np.random.default_rng(0)
    config = run_config(
        run,
        steps=100_000,
        checkpoint_every=EVERY,
        eval_every=0,
        plots=False,
        sample_tokens=0,
        optim={"schedule": "constant"},
    )
    (config_file := tmp_path / "config.yaml").write_text(dump_config(config))
    known = 0
    inside = 0
    for life in range(kills):
        options = ["--resume", "True"] if life else []
        process = started(config_file, run, *options)
        try:
            begun = (run / "metrics.jsonl").exists
            wait_until(begun, process)
            wait_until(lambda known=known: max(logged_steps(run)[-1:] or [0]) != known, process)
            time.sleep(rng.uniform(0, 1.5))
            first = life == 0 and not list((run / "checkpoints").glob("*/manifest.json"))
            if first:
                wait_until(lambda: list((run / "checkpoints").glob("*/manifest.json")), process)
            if life % 2:
                wait_until(lambda: in_a_save(run), process)
            inside += in_a_save(run)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        steps = logged_steps(run)
        assert steps == list(range(1, len(steps) + 1))
        known = len(steps)
        newest = max(int(p.parent.name) for p in (run / "checkpoints").glob("*/manifest.json"))
        # The save of the last interval may still have been under way; the next one, whose step is
        # logged first, waits for it, so that the loop is never more than two intervals ahead.
        assert known - newest <= 2 * EVERY
    print(f"{kills} kills, {inside} inside a save, {known} steps")
    process = started(config_file, run, "--resume", "True", "--steps", str(known + 5))
    assert process.wait(timeout=240) == 0
    records = [r for r in metrics_of(run) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, known + 6))
    assert len(events_of(run, "resume")) == kills
    assert not events_of(run, "bad_checkpoint")
    # All lives together are one run: the loss fell from ln 256 and no restart threw it back.
    values = np.array([r["loss"] for r in records])
    assert values[-20:].mean() < values[:20].mean() - 1
