"""Reads what a run directory holds, whatever a kill or an old version left out.

Imports neither JAX nor Matplotlib. Public names: `Run`, `Series`, `Reports`, `Span`, `read_run`.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from lowprec_jax.errors import UserError

__all__ = ["OPERAND_COLUMNS", "Reports", "Run", "Series", "Span", "read_run"]

Array = np.ndarray
Record = dict[str, Any]

OPERAND_COLUMNS = ("amax", "scale", "saturated", "underflow", "nonfinite", "age")


class Span(NamedTuple):
    """Steps `first` to `last`, both included, trained with one recipe."""

    recipe: str
    first: int
    last: int


class Series(NamedTuple):
    """A number over steps; NaN where the log holds null.

    Attributes:
      steps: rising, int64 [n].
      values: float64 [n].
    """

    steps: Array
    values: Array


class Reports(NamedTuple):
    """Numbers of many named things, reported now and then.

    Attributes:
      names: of the things, in the order of their first report.
      steps: of the reports, rising, int64 [reports].
      values: float32 [reports, names, columns]; NaN where a thing was not reported.
    """

    names: list[str]
    steps: Array
    values: Array


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory as arrays and plain values. What it does not hold is empty.

    Attributes:
      path: the directory.
      steps: steps that were logged, rising, int64 [n].
      columns: numbers of each step by name, float64 [n], NaN where there was none.
      phases: the recipes in force, in order.
      validation: validation loss, nats per token.
      operands: health of each operand; its columns are `OPERAND_COLUMNS`.
      sqnr: signal to quantization noise of each gradient, dB, one column.
      events: lines of ``events.jsonl``, in order.
      config: the config as nested values.
      texts: ``config.yaml`` and ``samples.txt`` as they are, by name.
      summary, environment, data_card: the JSON files.
    """

    path: Path
    steps: Array
    columns: dict[str, Array]
    phases: list[Span]
    validation: Series
    operands: Reports
    sqnr: Reports
    events: list[Record]
    config: Record
    texts: dict[str, str]
    summary: Record
    environment: Record
    data_card: Record

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def last_step(self) -> int:
        """The last step of which the logs tell anything."""
        told = [*self.steps[-1:], *self.validation.steps[-1:], *(e["step"] for e in self.events)]
        return int(max(told))

    def column(self, name: str) -> Series:
        """A number of every step; empty if no step has it."""
        values = self.columns.get(name)
        if values is None or not np.isfinite(values).any():
            return Series(self.steps[:0], np.zeros(0))
        return Series(self.steps, values)


def read_run(path: str | Path) -> Run:
    """Reads a run directory.

    A line of a log that is not a JSON object with a step (the last one of a killed run) is left
    out, and so is a JSON file that does not parse. Of a step that is logged twice, as after a
    rollback, the last record counts.

    Args:
      path: the directory of a run, finished or not.

    Raises:
      UserError: there is no such directory, or it holds no metrics.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"No run directory {str(path)!r}. Give the directory of a run, such as "
            "runs/quickstart; it holds metrics.jsonl."
        )
    log = _Log()
    for record in _records(path / "metrics.jsonl"):
        log.add(record)
    if not log.steps and not log.validation:
        raise UserError(
            f"{path} holds no metrics: metrics.jsonl is missing, or no line of it is a whole "
            "record. Give the directory of a run that has begun to train."
        )
    events = [e for e in _records(path / "events.jsonl") if isinstance(e.get("event"), str)]
    files = {name: _text(path / name) for name in ("config.yaml", "samples.txt")}
    return Run(
        path=path,
        events=events,
        config=_parsed(yaml.safe_load, files["config.yaml"]),
        texts={name: text for name, text in files.items() if text},
        summary=_parsed(json.loads, _text(path / "summary.json")),
        environment=_parsed(json.loads, _text(path / "environment.json")),
        data_card=_parsed(json.loads, _text(path / "data_card.json")),
        **log.arrays(),
    )


class _Log:
    """Collects the records of ``metrics.jsonl`` by column."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.columns: dict[str, list[float]] = {}
        self.recipes: list[str] = []
        self.validation: list[tuple[int, float]] = []
        self.operands = _ReportLog(len(OPERAND_COLUMNS))
        self.sqnr = _ReportLog(1)

    def add(self, record: Record) -> None:
        step = record["step"]
        if "validation_loss" in record:
            self.validation.append((step, _number(record["validation_loss"])))
        if "loss" not in record:
            return
        for name, value in record.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                column = self.columns.setdefault(name, [])
                column.extend([np.nan] * (len(self.steps) - len(column)))
                column.append(_number(value))
        self.steps.append(step)
        self.recipes.append(str(record.get("recipe", "")))
        self.operands.add(step, record.get("operands"))
        self.sqnr.add(step, record.get("sqnr"))

    def arrays(self) -> dict[str, Any]:
        """The fields of a `Run` that come from this log."""
        steps, kept = _last_of_each(self.steps)
        columns = {}
        for name, column in self.columns.items():
            missing = [np.nan] * (len(self.steps) - len(column))
            columns[name] = np.array(column + missing)[kept]
        validation = np.array([value for _, value in self.validation], float)
        evaluated, last = _last_of_each([step for step, _ in self.validation])
        return {
            "steps": steps,
            "columns": columns,
            "phases": _spans(steps, [self.recipes[i] for i in kept]),
            "validation": Series(evaluated, validation[last]),
            "operands": self.operands.arrays(),
            "sqnr": self.sqnr.arrays(),
        }


class _ReportLog:
    """Collects reports; each is kept as a small array, since there may be millions of numbers."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.index: dict[str, int] = {}
        self.found: list[tuple[int, Array, Array]] = []

    def add(self, step: int, report: Any) -> None:
        if not isinstance(report, dict) or not report:
            return
        try:  # null becomes NaN
            rows = np.array(list(report.values()), np.float32).reshape(len(report), self.columns)
        except (TypeError, ValueError, OverflowError):
            return  # not what we write
        ids = [self.index.setdefault(name, len(self.index)) for name in report]
        self.found.append((step, np.array(ids), rows))

    def arrays(self) -> Reports:
        steps, kept = _last_of_each([step for step, _, _ in self.found])
        values = np.full((len(kept), len(self.index), self.columns), np.nan, np.float32)
        for row, position in enumerate(kept):
            _, ids, numbers = self.found[position]
            values[row, ids] = numbers
        return Reports(list(self.index), steps, values)


def _last_of_each(steps: list[int]) -> tuple[Array, Array]:
    """The steps, rising, and where each is found for the last time."""
    newest = {step: position for position, step in enumerate(steps)}
    ordered = sorted(newest)
    return np.array(ordered, np.int64), np.array([newest[s] for s in ordered], np.int64)


def _spans(steps: Array, recipes: list[str]) -> list[Span]:
    spans: list[Span] = []
    for step, recipe in zip(steps.tolist(), recipes, strict=True):
        if spans and spans[-1].recipe == recipe:
            spans[-1] = spans[-1]._replace(last=step)
        else:
            spans.append(Span(recipe, step, step))
    return spans


def _records(path: Path) -> Iterator[Record]:
    """The lines of a log that are objects with a step."""
    for line in _lines(path):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _lines(path: Path) -> Iterable[str]:
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as lines:
        yield from lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parsed(parse: Callable[[str], Any], text: str) -> Record:
    """A text parsed as a mapping; empty if it is not one."""
    with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
        value = parse(text) if text else {}
        return value if isinstance(value, dict) else {}
    return {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
