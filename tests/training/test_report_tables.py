"""The words and numbers of a report."""

import json

import pytest

from lowprec_jax.training.report_data import read_run
from lowprec_jax.training.report_heatmap import Operand, parse_operand
from lowprec_jax.training.report_tables import (
    alarm_rows,
    event_rows,
    figures_of,
    operand_rows,
    phase_rows,
    state_of,
    time_rows,
)
from lowprec_jax.training.report_words import describe, duration, flatten, number, percent, size


@pytest.fixture
def run_of(tmp_path):
    """Makes a run of ten steps with these events, files and additions to its steps."""

    def make(events=(), summary=None, **more):
        steps = [{"step": i, "loss": 5.0 - i / 10, **more} for i in range(1, 11)]
        lines = "".join(json.dumps(record) + "\n" for record in steps)
        (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
        told = [{"time": "2026-01-02T03:04:05.678+00:00", "step": 5, **e} for e in events]
        lines = "".join(json.dumps(event) + "\n" for event in told)
        (tmp_path / "events.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / "config.yaml").write_text("steps: 10\n", encoding="utf-8")
        if summary is not None:
            (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return read_run(tmp_path)

    return make


@pytest.mark.parametrize(
    ("events", "summary", "kind", "part"),
    [
        ([], None, "unfinished", "step 10 of 10"),
        ([], {"steps": 10}, "finished", "after step 10"),
        ([], {"steps": 6}, "unfinished", "step 10"),
        ([{"event": "stop", "reason": "SIGTERM"}], None, "stopped", "step 10: SIGTERM"),
        ([{"event": "stop", "reason": "x"}, {"event": "resume"}], None, "unfinished", "step 10"),
        ([{"event": "early_stop", "best": 1}], {"steps": 10}, "finished", "stopped early"),
        ([], {"steps": 10, "stopped_by": "SIGINT"}, "stopped", "by SIGINT"),
    ],
)
def test_state_of__each_end__is_told_apart(run_of, events, summary, kind, part):
    found, sentence = state_of(run_of(events, summary))
    assert found == kind
    assert part in sentence


def test_figures_of__without_a_summary__come_from_the_log(run_of):
    figures = {f.name: f.value for f in figures_of(run_of(seconds=0.25, skipped=1, mfu=0.4))}
    assert figures["training loss"] == "4"
    assert figures["time of a step"] == "250 ms"
    assert figures["skipped updates"] == "10"
    assert figures["MFU"] == "40 %"


def test_figures_of__the_summary_of_an_earlier_part__does_not_count(run_of):
    for steps, value in ((6, "250 ms"), (10, "3 s")):
        run = run_of(seconds=0.25, summary={"steps": steps, "median_step_seconds": 3.0})
        assert {f.name: f.value for f in figures_of(run)}["time of a step"] == value


def test_figures_of__mfu_unknown__is_not_available_and_defined(run_of):
    figures = {f.name: f for f in figures_of(run_of(summary={"steps": 10, "mfu": None}))}
    assert figures["MFU"].value == "n/a"
    assert "FP8 peak" in figures["MFU"].note


def test_phase_rows__a_log_with_recipes__has_losses_at_the_ends(run_of):
    (row,) = phase_rows(run_of(recipe="fp8_current", seconds=2.0)).rows
    assert row == ("fp8_current", "1 to 10", "4.4500 to 4.4500", "2 s")
    assert phase_rows(run_of()).rows == []


def test_time_rows__the_summary__adds_up_to_all(run_of):
    spent = {"data": 1.0, "step": 3.0, "lost": 0.0}
    rows = time_rows(run_of(summary={"steps": 10, "seconds": spent})).rows
    assert rows == [("step", "3 s", "75 %"), ("data", "1 s", "25 %")]


def test_alarm_rows__an_alarm_and_its_end__are_one_row(run_of):
    alarm = {"operand": "a lhs", "what": "saturated", "value": 0.03, "limit": 0.01}
    events = [
        {"event": "alarm", **alarm},
        {"event": "alarm", **alarm, "what": "scale_age", "value": 1200, "limit": 1000, "step": 6},
        {"event": "alarm_over", **alarm, "value": None, "step": 8},
        {"event": "alarm", **alarm, "step": 9},
    ]
    assert alarm_rows(run_of(events)).rows == [
        ("a lhs", "saturated", "3 %", "1 %", "9", "still on"),
        ("a lhs", "scale age", "1,200 steps", "1,000 steps", "6", "still on"),
        ("a lhs", "saturated", "3 %", "1 %", "5", "8"),
    ]


def test_event_rows__many__are_the_last_ones_and_checkpoints_are_counted(run_of):
    events = [{"event": "skip", "loss": i} for i in range(250)] + [{"event": "checkpoint"}] * 3
    table = event_rows(run_of(events))
    assert len(table.rows) == 200
    assert "loss 249" in table.rows[-1][2]
    assert table.rows[0][3] == "2026-01-02 03:04:05"
    assert table.note == "The last 200 of 250. Besides, 3 checkpoints were written."


def test_operand_rows__the_last_report__has_the_worst_first(run_of):
    operands = {"a lhs": [1, 1, 0, 0.1, 0, 1], "b lhs": [2, 4, 0.2, 0.3, 5, 7]}
    table = operand_rows(run_of(operands=operands), count=1)
    assert table.rows == [("b lhs", "20 %", "30 %", "5", "2", "4", "7 steps ago")]
    assert table.note == "1 of 2 operands, as reported at step 10"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"event": "rollback", "to": 80, "reason": "3 spikes", "operands": ["a", "b"]},
         "to step 80: 3 spikes; operands: a, b"),
        ({"event": "rollback", "to": 80, "reason": "{0.__class__}", "operands": []},
         "to step 80: {0.__class__}"),
        ({"event": "skip", "loss": None, "grad_norm": 2.5, "limit": None},
         "update not applied: loss n/a, gradient norm 2.5"),
        ({"event": "alarm", "operand": "a lhs", "what": "underflow", "value": 0.6, "limit": 0.5},
         "a lhs: underflow 60 %, above 50 %"),
        ({"event": "stop"}, "n/a"),
        ({"event": "of tomorrow", "x": 1, "y": ["b"]}, "x: 1; y: b"),
    ],
)  # fmt: skip
def test_describe__an_event__says_all_it_holds(event, text):
    assert describe({"time": "t", "step": 3, **event}) == text


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (number, None, "n/a"),
        (number, float("nan"), "n/a"),
        (number, 12345.6, "12,346"),
        (number, 0.0123456, "0.01235"),
        (number, 7, "7"),
        (number, True, "True"),
        (percent, 0.0123, "1.23 %"),
        (percent, "x", "n/a"),
        (duration, 0.0119, "11.9 ms"),
        (duration, 16.04, "16 s"),
        (duration, 600, "10 min"),
        (duration, 13020, "3 h 37 min"),
        (duration, None, "n/a"),
        (size, 3 * 2**30, "3.00 GiB"),
        (size, 2**19, "0.5 MiB"),
    ],
)
def test_numbers__of_each_kind__have_units(form, value, text):
    assert form(value) == text


def test_flatten__nested_values__have_dotted_names_and_units():
    values = {"a": {"b_seconds": 0.5, "c_bytes": 2**30}, "seconds": {"step": 3.0}, "l": []}
    pairs = [("a.b", "500 ms"), ("a.c", "1.00 GiB"), ("seconds.step", "3 s"), ("l", "none")]
    assert flatten(values) == pairs


@pytest.mark.parametrize(
    ("name", "operand"),
    [
        ("blocks/mlp/down[12] output_grad", Operand("output_grad", 12, "mlp/down")),
        ("blocks/3/attention/qkv lhs", Operand("lhs", 3, "attention/qkv")),
        ("blocks/mlp/down rhs", Operand("rhs", -1, "mlp/down")),
        ("blocks/mlp/down/kernel[2]", Operand("", 2, "mlp/down/kernel")),
        ("conv2d rhs", Operand("rhs", -1, "conv2d")),
    ],
)
def test_parse_operand__scanned_unrolled_and_others__finds_layer_and_role(name, operand):
    assert parse_operand(name) == operand
