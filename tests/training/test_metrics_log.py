"""Where numbers and events go: whole lines of JSON, TensorBoard, Weights & Biases."""

import contextlib
import importlib.machinery
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from datetime import datetime, timedelta

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from lowprec_jax.errors import UserError
from lowprec_jax.training.metrics_log import EventLog, MetricsLog
from lowprec_jax.training.wandb_run import WandbRun, require_wandb


def parse(text: str) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def open_log(folder, **options) -> MetricsLog:
    return MetricsLog(folder / "metrics.jsonl", folder / "tensorboard", **options)


def lines_of(folder) -> list[dict]:
    return parse((folder / "metrics.jsonl").read_text(encoding="utf-8"))


def events_of(folder) -> list[Event]:
    """What TensorBoard reads, in the order of names: length, its checksum, an event, its."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars_of(folder) -> list[tuple[int, str, float]]:
    return [(e.step, v.tag, v.simple_value) for e in events_of(folder) for v in e.summary.value]


def test_events_of__a_file_of_tensorboardx__is_read(tmp_path):
    """The reader of this module, against the writer it is for."""
    (tmp_path / "tensorboard").mkdir()
    writer = RecordWriter(str(tmp_path / "tensorboard" / "file"))
    for step in (3, 5):
        writer.write(Event(step=step).SerializeToString())
    writer.close()
    assert [event.step for event in events_of(tmp_path)] == [3, 5]


def test_metrics_log__numbers_that_are_not_finite__are_null_at_any_depth(tmp_path):
    with contextlib.closing(open_log(tmp_path)) as log:
        operands = {"up lhs": [math.inf, 0.5, 0.0, 0.0, 3.0, 1.0]}
        log.write({"step": 1, "loss": math.nan, "worst": "up lhs", "operands": operands})
        log.write({"step": 2, "loss": np.float32(0.5), "skipped": np.int32(1), "mfu": None})
    assert lines_of(tmp_path) == [
        {
            "step": 1,
            "loss": None,
            "worst": "up lhs",
            "operands": {"up lhs": [None, 0.5, 0.0, 0.0, 3.0, 1.0]},
        },
        {"step": 2, "loss": 0.5, "skipped": 1, "mfu": None},
    ]


def test_metrics_log__tensorboard__has_every_number_under_its_step(tmp_path):
    operands = {"up[2] lhs": [8.0, 0.5, 0.25, 0.125, 3.0, 7.0]}
    with contextlib.closing(open_log(tmp_path)) as log:
        log.write({"step": 1, "loss": 2.0, "grad_norm": math.nan, "mfu": None, "recipe": "none"})
        log.write({"step": 2, "loss": 1.5, "operands": operands, "sqnr": {"up/kernel": 31.5}})
    # TensorBoard allows no spaces and brackets in names.
    names = ("amax", "scale", "saturated", "underflow", "nonfinite", "age")
    row = dict(zip(names, operands["up[2] lhs"], strict=True))
    assert scalars_of(tmp_path) == [
        (1, "loss", 2.0),
        (2, "loss", 1.5),
        *((2, f"operand/up_2__lhs/{name}", value) for name, value in row.items()),
        (2, "sqnr/up/kernel", 31.5),
    ]


def test_metrics_log__rewind__forgets_later_steps_in_the_file_and_in_tensorboard(tmp_path):
    with contextlib.closing(open_log(tmp_path)) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 0.1 * step})
        log.write({"step": 2, "validation_loss": 7.0})
        log.rewind(2)
        log.write({"step": 3, "loss": 9.0})
    assert lines_of(tmp_path) == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 2, "validation_loss": 7.0},
        {"step": 3, "loss": 9.0},
    ]
    # TensorBoard drops what is at or after the step of a START in a newer file.
    starts = [e.step for e in events_of(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [3]
    tags = [(step, tag) for step, tag, _ in scalars_of(tmp_path)]
    assert tags == [*((i, "loss") for i in (1, 2, 3)), (2, "validation_loss"), (3, "loss")]
    assert scalars_of(tmp_path)[-1] == (3, "loss", 9.0)


def test_metrics_log__rewind_before_the_first_record__opens_one_tensorboard_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    with contextlib.closing(open_log(tmp_path)) as log:
        log.rewind(1)
        log.write({"step": 2, "loss": 1.0})
    assert lines_of(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1.0}]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', '{"step": 3}'])
def test_metrics_log__last_line_was_cut_off__is_removed_by_who_goes_on(tmp_path, cut):
    text = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(text + cut, encoding="utf-8")
    with contextlib.closing(open_log(tmp_path)) as log:
        log.write({"step": 3, "loss": 1.0})
    assert lines_of(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_metrics_log__other_process_of_a_run__writes_nothing(tmp_path):
    with contextlib.closing(open_log(tmp_path, writes=False)) as log:
        log.write({"step": 1, "loss": 1.0})
        log.rewind(0)
    with contextlib.closing(EventLog(tmp_path / "events.jsonl", writes=False)) as events:
        events.write(1, "start")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
from lowprec_jax.training.metrics_log import MetricsLog
folder = Path(sys.argv[1])
log = MetricsLog(folder / "metrics.jsonl", folder / "tensorboard")
operands = {f"blocks/mlp/down[{i}] lhs": [0.1] * 6 for i in range(300)}
print("go", flush=True)
for step in range(1, 10**9):
    log.write({"step": step, "operands": operands})
"""


def test_metrics_log__killed_while_it_writes__every_line_but_the_last_is_whole(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [record["step"] for record in parse("\n".join(lines[:-1]))] == list(range(1, len(lines)))
    with contextlib.closing(open_log(tmp_path)) as log:
        log.rewind(len(lines) - 1)
    assert [record["step"] for record in lines_of(tmp_path)] == list(range(1, len(lines)))


def test_event_log__two_processes_after_each_other__append(tmp_path):
    for kind in ("start", "resume"):
        with contextlib.closing(EventLog(tmp_path / "events.jsonl")) as events:
            events.write(4, kind, loss=math.inf, operands=("up lhs",))
    first, second = parse((tmp_path / "events.jsonl").read_text(encoding="utf-8"))
    assert (first.pop("event"), second.pop("event")) == ("start", "resume")
    for record in (first, second):
        assert datetime.fromisoformat(record.pop("time")).utcoffset() == timedelta(0)
        assert record == {"step": 4, "loss": None, "operands": ["up lhs"]}


# Weights & Biases: a stand-in with the four functions that are used.


class FakeRun:
    def __init__(self, options):
        self.id = options["id"] or "fresh"
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.items()))


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb/__init__.py")
    module.runs = []
    module.Error = type("Error", (Exception,), {})

    def init(**options):
        module.options = options
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def start(folder) -> WandbRun:
    return WandbRun("project", name="run", folder=folder, config={"seed": 1})


def test_wandb__a_run__gets_the_numbers_with_their_own_step(tmp_path, wandb):
    with contextlib.closing(open_log(tmp_path, wandb=start(tmp_path))) as log:
        log.write({"step": 5, "loss": 2.0, "recipe": "none"})
    assert wandb.options["project"] == "project"
    assert wandb.options["config"] == {"seed": 1}
    assert wandb.runs[0].calls == [
        ("define_metric", "*", ("step_metric", "step")),
        ("log", {"step": 5, "loss": 2.0}),
        ("finish",),
    ]


def test_wandb__resumed_run__is_the_same_run_there(tmp_path, wandb):
    start(tmp_path)
    assert wandb.options["id"] is None
    start(tmp_path)
    assert wandb.options["id"] == "fresh"
    assert wandb.options["resume"] == "allow"


def test_wandb__no_account__is_a_message_and_leaves_no_id(tmp_path, wandb):
    def init(**_):
        raise wandb.Error("api_key not configured.")

    wandb.init = init
    with pytest.raises(UserError, match=r"api_key not configured\. .*WANDB_MODE=offline"):
        start(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wandb__asked_for_and_missing__is_refused_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    require_wandb("")
    # The folder that its runs leave is no installation, though Python imports it.
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match=r"'project' asks for .* \"pip install wandb\""):
        require_wandb("project")
