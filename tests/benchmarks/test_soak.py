import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def soak(*words: str) -> subprocess.CompletedProcess:
    """Runs ``python -m benchmarks.soak``, compiled in half the time, every program by itself."""
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # equal digests are to say that compiling is so
    command = [sys.executable, "-m", "benchmarks.soak", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)


@pytest.mark.nightly
def test_steps__short_run__nothing_grows_and_nothing_is_compiled_again(tmp_path):
    path = tmp_path / "steps.json"

    done = soak("steps", "--steps", "6", "--every", "2", "--json", str(path))

    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert [row["step"] for row in record["rows"]] == [2, 4, 6]
    assert {row["compiled after step 1"] for row in record["rows"]} == {0}
    assert len({row["live arrays"] for row in record["rows"]}) == 1
    # The model has 25,760 f32 parameters; the process also holds XLA.
    assert all(100 < row["resident MiB"] < 4000 for row in record["rows"])
    assert "device_count=8" in record["machine"]["xla_flags"]


@pytest.mark.nightly
def test_determinism__two_runs__have_the_same_digest(tmp_path):
    path = tmp_path / "determinism.json"

    done = soak(
        *("determinism", "--steps", "2", "--runs", "2", "--layouts", "data 8"),
        *("--json", str(path)),
    )

    assert done.returncode == 0, done.stderr
    first, second = json.loads(path.read_text())["rows"]
    assert first == second
    assert len(first["sha256"]) == 64
    assert first["copies agree"] is True
