"""What is read of a run directory that a kill, a rollback or a person has been at."""

import json

import numpy as np
import pytest

from lowprec_jax.errors import UserError
from lowprec_jax.state import OperandColumn
from lowprec_jax.training.report_data import OPERAND_COLUMNS, Span, read_run


def write_lines(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail, encoding="utf-8")


def step(number, loss=1.0, **more):
    return {"step": number, "loss": loss, **more}


def test_operand_columns__of_the_log__are_those_of_the_table_on_the_device():
    names = [column.name.lower() for column in OperandColumn]
    assert [*OPERAND_COLUMNS, "size"] == names  # sizes are not logged


def test_read_run__lines_that_are_no_records__are_left_out(tmp_path):
    junk = '7\nnull\n{"loss": 1.0}\n{"step": "3", "loss": 1.0}\nnot json\n\0\n{"step": 4, "lo'
    write_lines(tmp_path / "metrics.jsonl", [step(1), step(2)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n" + junk.encode())
    assert read_run(tmp_path).steps.tolist() == [1, 2]


def test_read_run__null__is_nan_and_a_number_of_some_steps_has_gaps(tmp_path):
    records = [step(1), step(2, None, mfu=0.5), step(3)]
    write_lines(tmp_path / "metrics.jsonl", records)
    run = read_run(tmp_path)
    np.testing.assert_array_equal(run.columns["loss"], [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(run.columns["mfu"], [np.nan, 0.5, np.nan])
    assert len(run.column("grad_norm").steps) == 0


def test_read_run__steps_logged_again__count_as_they_were_logged_last(tmp_path):
    records = [step(1), step(2, 9.0), step(3, 9.0), {"step": 3, "validation_loss": 9.0}]
    again = [step(2, 2.0), step(3, 3.0), {"step": 3, "validation_loss": 4.0}]
    write_lines(tmp_path / "metrics.jsonl", [*records, *again])
    run = read_run(tmp_path)
    assert run.steps.tolist() == [1, 2, 3]
    assert run.columns["loss"].tolist() == [1.0, 2.0, 3.0]
    assert run.validation.values.tolist() == [4.0]


def test_read_run__recipes__are_phases(tmp_path):
    recipes = ["none", "none", "fp8_delayed", "none"]
    write_lines(tmp_path / "metrics.jsonl", [step(i, recipe=r) for i, r in enumerate(recipes, 1)])
    expected = [Span("none", 1, 2), Span("fp8_delayed", 3, 3), Span("none", 4, 4)]
    assert read_run(tmp_path).phases == expected


def test_read_run__operands_that_come_and_go__are_nan_where_they_are_not(tmp_path):
    row, other = [4.0, 0.5, 0.1, None, 0, 3], [8.0, 1.0, None, 0.2, 1, 0]
    reports = [{"a lhs": row}, {"b lhs": other, "a lhs": row}, {"b lhs": [1, 2]}, "no report"]
    records = [step(i, operands=o) for i, o in enumerate(reports, 1)]
    write_lines(tmp_path / "metrics.jsonl", records)
    operands = read_run(tmp_path).operands
    assert operands.names == ["a lhs", "b lhs"]
    assert operands.steps.tolist() == [1, 2]
    np.testing.assert_array_equal(operands.values[:, 0], np.array([row, row], np.float32))
    np.testing.assert_array_equal(operands.values[1, 1], np.array(other, np.float32))
    assert np.isnan(operands.values[0, 1]).all()


@pytest.mark.parametrize("text", ["[1", "7", "!!python/object:os.system x", "a: b: c", "\xff{"])
def test_read_run__files_that_do_not_parse__are_empty(tmp_path, text):
    write_lines(tmp_path / "metrics.jsonl", [step(1)])
    for name in ("summary.json", "config.yaml", "environment.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    run = read_run(tmp_path)
    assert (run.summary, run.config, run.environment) == ({}, {}, {})
    assert run.name == tmp_path.name


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_read_run__no_metrics__is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="holds no metrics"):
        read_run(tmp_path)


def test_read_run__no_directory__is_refused(tmp_path):
    with pytest.raises(UserError, match="No run directory"):
        read_run(tmp_path / "nothing")
