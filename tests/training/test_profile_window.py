"""A profile of a few steps."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lowprec_jax.training.profile_window import ProfileWindow


@jax.jit
def compiled_step(x):
    return x @ x / 64


def train(window: ProfileWindow, steps, x=None):
    """A loop as the program has it."""
    x = jnp.ones((64, 64)) if x is None else x
    for step in steps:
        with window.step(step, x):
            x = compiled_step(x)
    return x


def traces(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.trace.json.gz"))


def marked_steps(trace: Path) -> list[int]:
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    found = [e for e in events if e.get("name", "").startswith("train")]
    return sorted(int(e["args"]["step_num"]) for e in found if "step_num" in e.get("args", {}))


def test_window__a_run__leaves_a_trace_of_its_steps_and_no_other(tmp_path):
    with ProfileWindow(2, 3, tmp_path) as window:
        train(window, range(1, 9))
    (trace,) = traces(tmp_path)
    assert marked_steps(trace) == [3, 4, 5]
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("error", [None, RuntimeError("broken")])
def test_window__run_ends_inside__trace_is_closed(tmp_path, error):
    def run():
        with ProfileWindow(1, 100, tmp_path) as window:
            train(window, range(1, 4))
            if error:
                raise error

    if error:
        with pytest.raises(RuntimeError, match="broken"):
            run()
    else:
        run()
    assert marked_steps(traces(tmp_path)[0]) == [2, 3]
    jax.profiler.start_trace(str(tmp_path / "another"))  # refused while one is running
    jax.profiler.stop_trace()


def test_window__rollback_through_it__records_once(tmp_path):
    with ProfileWindow(1, 2, tmp_path) as window:
        x = train(window, [1, 2])
        x = train(window, [1, 2, 3, 4], x)
    (trace,) = traces(tmp_path)
    assert marked_steps(trace) == [2]


def test_window__zero_steps__records_nothing(tmp_path):
    with ProfileWindow(0, 0, tmp_path) as window:
        train(window, range(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_window__its_edges__wait_for_the_device(tmp_path, monkeypatch):
    """The state that a step gets is ready before the trace begins, and before it ends."""
    order = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: order.append(f"wait for {x}"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: order.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: order.append("stop"))
    with ProfileWindow(1, 2, tmp_path) as window:
        for step in range(1, 6):
            with window.step(step, f"state {step - 1}"):
                order.append(step)
    assert order == [1, "wait for state 1", "start", 2, 3, "wait for state 3", "stop", 4, 5]
