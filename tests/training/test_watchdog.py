"""A process that makes no progress ends, and says where it hangs. Each case is a process."""

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from lowprec_jax.training.watchdog import EXIT_STALLED, Watchdog

pytestmark = pytest.mark.reliability

START = """
import ctypes, sys, threading, time
from pathlib import Path
from lowprec_jax.training.watchdog import Watchdog
stacks = Path(sys.argv[1])
print("ready", flush=True)
"""


class Ended(NamedTuple):
    code: int
    seconds: float
    stderr: str
    stacks: str


def run(tmp_path: Path, code: str, stacks: str = "stacks.txt") -> Ended:
    """Runs a process and times it from its "ready" on."""
    path = tmp_path / stacks
    command = [sys.executable, "-c", START + code, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        try:
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
        seconds = time.monotonic() - begin
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return Ended(process.returncode, seconds, stderr, text)


def test_watchdog__data_does_not_come__dumps_all_stacks_and_exits(tmp_path):
    ended = run(
        tmp_path,
        """
def read_batch(queue):
    queue.wait()
def feed_forever():
    time.sleep(100)
threading.Thread(target=feed_forever, daemon=True).start()
with Watchdog(1.0, stacks) as watchdog:
    watchdog.beat("step 12")
    read_batch(threading.Event())
""",
    )
    assert ended.code == EXIT_STALLED
    assert 1 <= ended.seconds <= 3
    for text in (ended.stderr, ended.stacks):
        assert "read_batch" in text
        assert "feed_forever" in text
        assert "no progress for 1 s (stall_timeout) since step 12" in text
        assert str(tmp_path / "stacks.txt") in text


def test_watchdog__beats_come__lives(tmp_path):
    ended = run(
        tmp_path,
        """
with Watchdog(1.0, stacks) as watchdog:
    for step in range(7):
        time.sleep(0.25)
        watchdog.beat(f"step {step}")
time.sleep(1.5)
""",
    )
    assert (ended.code, ended.stderr, ended.stacks) == (0, "", "")


def test_watchdog__paused__waits_until_the_pause_is_over(tmp_path):
    ended = run(
        tmp_path,
        """
with Watchdog(0.5, stacks) as watchdog:
    with watchdog.paused("the compilation"), watchdog.paused("the inner"):
        time.sleep(1)
        pass
    print("compiled", file=sys.stderr, flush=True)
    time.sleep(100)
""",
    )
    assert ended.code == EXIT_STALLED
    assert 1.5 <= ended.seconds <= 3.5
    assert ended.stderr.startswith("compiled")
    assert "since the compilation" in ended.stderr


def test_watchdog__inner_pause_is_over__the_outer_one_holds(tmp_path):
    ended = run(
        tmp_path,
        """
with Watchdog(0.5, stacks) as watchdog, watchdog.paused("the outer"):
    with watchdog.paused("the inner"):
        pass
    time.sleep(2)
""",
    )
    assert (ended.code, ended.stderr) == (0, "")


def test_watchdog__main_thread_holds_the_gil__is_ended_all_the_same(tmp_path):
    """No Python thread can run then: faulthandler's own ends the process, with exit code 1."""
    ended = run(
        tmp_path,
        """
def hold():
    ctypes.PyDLL(None).sleep(100)
with Watchdog(1.0, stacks):
    time.sleep(0.5)
    hold()
""",
    )
    assert ended.code == 1
    assert 1 <= ended.seconds <= 3.5
    assert "hold" in ended.stderr


def test_watchdog__stacks_cannot_be_written__ends_it_all_the_same(tmp_path):
    ended = run(
        tmp_path, "\nwith Watchdog(0.5, stacks):\n    time.sleep(100)\n", "missing/stacks.txt"
    )
    assert ended.code == EXIT_STALLED
    assert "Stalled" in ended.stderr


def test_watchdog__disk_hangs__ends_it_all_the_same(tmp_path):
    ended = run(
        tmp_path,
        """
class Hanging:
    def open(self, *args, **kwargs):
        time.sleep(100)
with Watchdog(0.5, Hanging()):
    time.sleep(100)
""",
    )
    assert ended.code == 1
    assert ended.seconds <= 3
    assert "Stalled" in ended.stderr


def test_watchdog__zero__is_off(tmp_path):
    ended = run(
        tmp_path, "\nwith Watchdog(0, stacks) as w:\n    time.sleep(0.5)\n    w.beat('a')\n"
    )
    assert (ended.code, ended.stderr, ended.stacks) == (0, "", "")


def test_watchdog__left_by_an_error__ends_its_thread(tmp_path):
    watchdog = Watchdog(1000.0, tmp_path / "stacks.txt")
    begin = time.monotonic()
    with pytest.raises(ValueError, match="broken"), watchdog:
        raise ValueError("broken")
    assert time.monotonic() - begin < 1  # it does not sleep out its period
    assert watchdog._thread is not None
    assert not watchdog._thread.is_alive()
