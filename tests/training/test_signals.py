"""A signal ends a run after the step in progress; what it leaves goes on as if never stopped."""

import dataclasses
import os
import signal
import threading
import time

import pytest

from lowprec_jax import data
from lowprec_jax.cli import main as cli
from lowprec_jax.sharding import Layout
from lowprec_jax.training import loop, programs
from lowprec_jax.training.checkpoint import Checkpoints
from lowprec_jax.training.signals import EXIT_STOPPED, StopRequest
from lowprec_jax.training.step_reader import StepReader
from training.helpers import metrics_of

pytestmark = pytest.mark.reliability


@pytest.fixture
def signal_at(monkeypatch):
    """Sends this process a signal while a step is handed to the metrics."""

    def install(number, step):
        plain = StepReader.next

        def next_(self, at, metrics, also=None):
            if at == step:
                os.kill(os.getpid(), number)
            return plain(self, at, metrics, also)

        monkeypatch.setattr(StepReader, "next", next_)

    return install


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal__in_a_step__saves_and_the_resumed_run_is_the_straight_one(
    number, run_config, tmp_path, signal_at, monkeypatch
):
    config = run_config(tmp_path / "run", plots=False, sample_tokens=0)
    signal_at(number, 3)
    before = signal.getsignal(number)
    assert loop.train(config) == {"steps": 3, "stopped_by": number.name}
    assert signal.getsignal(number) == before
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "3" in names
    assert [r["step"] for r in metrics_of(tmp_path / "run") if "loss" in r] == [1, 2, 3]
    assert not (tmp_path / "run" / "summary.json").exists()

    monkeypatch.undo()
    resumed = loop.train(dataclasses.replace(config, resume=True))
    straight = loop.train(dataclasses.replace(config, run_dir=str(tmp_path / "straight")))
    assert resumed["validation_loss"] == straight["validation_loss"]
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "straight")


def test_signal__before_the_first_step__leaves_a_directory_that_can_be_started_in(
    run_config, tmp_path, monkeypatch, capsys
):
    config = run_config(tmp_path / "run", plots=False, sample_tokens=0, steps=3)
    build = programs.build_programs

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args, **options)

    monkeypatch.setattr(programs, "build_programs", interrupted)
    assert loop.train(config) == {"steps": 0, "stopped_by": "SIGTERM"}
    assert "nothing was trained" in capsys.readouterr().out
    monkeypatch.undo()
    assert loop.train(config)["steps"] == 3


@pytest.fixture(autouse=True)
def usual_handlers():
    """A job in the background of a shell ignores SIGINT; here both signals act as usual."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupts(monkeypatch, owner, name: str, number: int) -> None:
    """Sends SIGTERM when a function is called for the given time, before it does its work."""
    plain, calls = getattr(owner, name), []

    def wrapped(*args, **options):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


# Phase -> what is running when the signal comes, and the steps that are completed in the end.
# Batches: one calibrates, so that the fifth is that of step 4.
PHASES = {
    "compile": (programs, "build_programs", 1, 0),
    "data_wait": (data.Batches, "batch", 5, 4),
    "step": (StepReader, "next", 3, 3),
    "evaluation": (Layout, "put_batch", 1, 2),
    "save": (Checkpoints, "save", 1, 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_signal__in_any_phase__ends_the_run_in_time_with_a_good_checkpoint(
    phase, run_config, tmp_path, monkeypatch
):
    owner, name, number, completed = PHASES[phase]
    interrupts(monkeypatch, owner, name, number)
    received = []
    remember = StopRequest._remember
    monkeypatch.setattr(
        StopRequest,
        "_remember",
        lambda self, *args: (received.append(time.monotonic()), remember(self, *args))[1],
    )
    run = tmp_path / "run"
    summary = loop.train(run_config(run, plots=False, sample_tokens=0))
    assert time.monotonic() - received[0] < 30
    assert summary == {"steps": completed, "stopped_by": "SIGTERM"}
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        found = checkpoints.newest()
    assert (found.manifest.step if found else 0) == completed


def test_signal__second_one_in_a_save__costs_no_checkpoint(run_config, tmp_path, monkeypatch):
    """The second Ctrl-C ends the process as usual; the checkpoint before is as it was."""
    run = tmp_path / "run"
    config = run_config(run, plots=False, sample_tokens=0, eval_every=0, checkpoint_every=2)
    publish = Checkpoints._publish

    def slow(self, folder, step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # two at once would be one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        publish(self, folder, step, *rest)

    monkeypatch.setattr(Checkpoints, "_publish", slow)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config)
    monkeypatch.undo()
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.newest().damaged == []
    assert loop.train(dataclasses.replace(config, resume=True))["steps"] == 8


def test_main__run_that_a_signal_stopped__has_an_exit_code_of_its_own(monkeypatch):
    stopped = {"steps": 3, "stopped_by": "SIGTERM"}
    monkeypatch.setattr(loop, "train", lambda config: stopped)
    assert cli.main(["train", "--smoke"]) == EXIT_STOPPED


def test_stop_request__second_signal__acts_as_usual():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_request__outside_of_the_main_thread__never_asks_to_stop():
    found = []

    def run():
        with StopRequest() as stop:
            found.append(stop.agreed(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
