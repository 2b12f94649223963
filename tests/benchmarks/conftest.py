import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run_benchmark():
    """Runs ``python -m benchmarks.NAME`` on one device, as a person would."""

    def run(name: str, *words: str) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        command = [sys.executable, "-m", f"benchmarks.{name}", *words]
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)

    return run
