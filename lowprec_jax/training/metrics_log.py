"""Where the numbers and the events of a run go: JSON lines, TensorBoard, Weights & Biases.

Public names: `MetricsLog`, `EventLog`, `Record`.
"""

import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lowprec_jax.state import OperandColumn
from lowprec_jax.training.wandb_run import WandbRun

__all__ = ["EventLog", "MetricsLog", "Record"]

Record = dict[str, Any]
# Of a row of `operand_table`; its size says nothing that changes.
LOGGED_COLUMNS = tuple(OperandColumn)[: OperandColumn.SIZE]


class MetricsLog:
    """Appends records to ``metrics.jsonl``, and their numbers to TensorBoard and W&B.

    A killed run leaves a valid file: only the last line can be cut off, and whoever opens the file
    next removes it. TensorBoard files are written if tensorboardX is installed.

    Args:
      path: the file.
      tensorboard: folder for TensorBoard.
      writes: if not, as in all processes of a run but the first, nothing is written.
      wandb: the run at Weights & Biases, if any; closed with the log.
    """

    def __init__(
        self, path: Path, tensorboard: Path, *, writes: bool = True, wandb: WandbRun | None = None
    ):
        self._lines = _JsonLines(path) if writes else None
        self._board = _TensorBoard(tensorboard)
        self._wandb = wandb

    def write(self, record: Record) -> None:
        """Appends one record, which has its "step".

        A number that is not finite is null in the file, as JSON has none, and a gap in curves.
        """
        if self._lines is None:
            return
        self._lines.write(record)
        numbers = {tag: value for tag, value in _numbers(record) if math.isfinite(value)}
        self._board.write(record["step"], numbers)
        if self._wandb is not None:
            self._wandb.write(record["step"], numbers)

    def rewind(self, step: int) -> None:
        """Forgets what was logged after a step: the run goes on from there.

        For a resume, before the first record, and for a rollback. The records leave the file and
        TensorBoard; Weights & Biases cannot forget and shows such steps twice.
        """
        if self._lines is not None:
            self._lines.keep(lambda record: record["step"] <= step)
            self._board.rewind(step)

    def close(self) -> None:
        """Closes the files."""
        for sink in (self._lines, self._board, self._wandb):
            if sink is not None:
                sink.close()


class EventLog:
    """Appends what happened to ``events.jsonl``: skips, rollbacks, switches, checkpoints, the end.

    Unlike the metrics it is never rewound: it tells the story of a run, with what was undone.

    Args:
      path: the file.
      writes: if not, as in all processes of a run but the first, nothing is written.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self._lines = _JsonLines(path) if writes else None

    def write(self, step: int, kind: str, **fields: Any) -> None:
        """Appends an event.

        Args:
          step: completed steps.
          kind: what happened, such as "rollback".
          **fields: more about it: numbers, text, lists and dicts of them.
        """
        if self._lines is not None:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._lines.write({"time": time, "step": step, "event": kind, **fields})

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()


class _JsonLines:
    """A file of JSON objects, one a line, that is only ever appended to in whole lines."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        if _is_cut_off(path):
            self.keep(lambda record: True)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Removes the records that are not wanted and lines that are no JSON; whole or not at all.

        Streams, so that a log of any length fits.
        """
        self._file.close()
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with self._path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
            new.writelines(line for line in old if _is_wanted(line, wanted))
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def _is_cut_off(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return file.read() not in (b"", b"\n")


def _is_wanted(line: str, wanted: Callable[[Record], bool]) -> bool:
    try:
        return line.endswith("\n") and wanted(json.loads(line))
    except json.JSONDecodeError:
        return False


def _finite(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite are None, those of NumPy plain."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    """``(tag, number)`` of everything in a record that can be drawn as a curve."""
    for name, value in record.items():
        if isinstance(value, int | float) and name != "step":
            yield name, value
    for name, row in record.get("operands", {}).items():
        for column, value in zip(LOGGED_COLUMNS, row, strict=True):
            yield f"operand/{name}/{column.name.lower()}", value
    for path, value in record.get("sqnr", {}).items():
        yield f"sqnr/{path}", value


class _TensorBoard:
    """Curves for TensorBoard; the file is opened by the first number."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None
        self._purge_step: int | None = None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            SummaryWriter = None
        self._open = SummaryWriter

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if self._open is None:
            return
        if self._writer is None:
            # Files are named by the second, and one of the same second would be overwritten.
            number = len(list(self._folder.glob("*")))
            self._writer = self._open(
                str(self._folder), purge_step=self._purge_step, filename_suffix=f".{number}"
            )
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)

    def rewind(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
