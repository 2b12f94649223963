"""Where metrics go: a JSONL file first, then TensorBoard and the progress line."""

import json
import math
import time
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lowprec_jax.training.step import StepMetrics

Record = dict[str, Any]

# Updates that may be skipped in a row before the run stops: the data or the scales are broken.
MAX_SKIPPED = 20


def step_record(step: int, metrics: StepMetrics, names: list[str]) -> Record:
    """A step's metrics as plain numbers; waits until the device has computed them.

    Args:
      step: number of the step, from 1.
      metrics: from the training step.
      names: `lowprec_jax.state.operand_names` of the model.
    """
    host = jax.device_get(metrics)
    record = {
        "step": step,
        "loss": float(host.loss),
        "grad_norm": float(host.grad_norm),
        "skipped": int(host.skipped),
    }
    if host.health is not None:
        record |= {
            "saturated": float(host.health.saturated),
            "underflow": float(host.health.underflow),
            "nonfinite": float(host.health.nonfinite),
            "scale_age": float(host.health.scale_age),
            "worst": names[int(host.health.worst)],
        }
    return record


class MetricsLog:
    """Appends records to ``metrics.jsonl``, whole lines only, and to TensorBoard if installed.

    A killed run leaves a valid file: only the last line can be cut off.

    Args:
      path: the file.
      tensorboard: folder for TensorBoard.
      writes: if not, as in all processes of a run but the first, nothing is written.
    """

    def __init__(self, path: Path, tensorboard: Path, *, writes: bool = True):
        self._file = path.open("a", encoding="utf-8") if writes else None
        self._board = _tensorboard_writer(tensorboard) if writes else None

    def write(self, record: Record) -> None:
        """Appends one record; its numbers go to TensorBoard under its step.

        A number that is not finite becomes null: JSON has none.
        """
        if self._file is None:
            return
        finite = {k: None if _is_nonfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _tensorboard_writer(path: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path))


class ProgressLine:
    """What a person watches: a bar with ETA; below it loss, tokens/s and FP8 health.

    Without a terminal, or with `live` off, one plain line is printed every `every` steps.
    """

    def __init__(self, console: Console, start: int, steps: int, *, live: bool, every: int):
        self._console = console
        self._every, self._steps, self._first = every, steps, start
        self._validation = ""
        self._rate = 0.0  # tokens per second, running mean
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task("", total=steps, completed=start)
        self._text = Text()
        self._live = None
        if live and console.is_terminal:
            self._live = Live(Group(self._bar, self._text), console=console, refresh_per_second=8)
        self._begin = time.perf_counter()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def validation(self, loss: float) -> None:
        """Remembers the newest validation loss."""
        self._validation = f"  val {loss:.4f}"

    def update(self, record: Record) -> None:
        """Shows a step."""
        step, rate = record["step"], record["tokens_per_second"]
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate
        line = _describe(record, self._rate) + self._validation
        if self._live is not None:
            self._text.plain = line
            self._bar.update(self._task, completed=step)
        elif step % self._every == 0 or step == self._steps:
            elapsed = time.perf_counter() - self._begin
            eta = elapsed / max(step - self._first, 1) * (self._steps - step)
            self._console.print(
                f"step {step}/{self._steps}  {line}  eta {eta:.0f} s", soft_wrap=True
            )


class StepReader:
    """Reads metrics one step late, so that the device never waits; logs and shows them.

    Args:
      names: see `step_record`.
      log: where records go.
      line: what shows them.
      tokens: tokens of a step.
    """

    def __init__(self, names: list[str], log: MetricsLog, line: ProgressLine, *, tokens: int):
        self._names, self._log, self._line = names, log, line
        self._unread: tuple[int, StepMetrics] | None = None
        self._skipped_in_a_row = 0
        self.tokens = tokens
        self.seconds: list[float] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last step out of the time of the next."""
        self._last = time.perf_counter()

    def next(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a step that has just been started; reads those before it."""
        self.finish()
        self._unread = (step, metrics)

    def finish(self) -> None:
        """Waits for the newest metrics and reads them.

        Raises:
          FloatingPointError: too many updates in a row were skipped.
        """
        if self._unread is None:
            return
        record = step_record(*self._unread, self._names)
        self._unread = None
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        record |= {"seconds": self.seconds[-1], "tokens_per_second": self.tokens / self.seconds[-1]}
        self._log.write(record)
        self._line.update(record)
        self._stop_if_broken(record)

    def _stop_if_broken(self, record: Record) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record["skipped"] else 0
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"Loss or gradients were not finite in {MAX_SKIPPED} steps in a row, the last at "
                f"step {record['step']} (loss {record['loss']}). No such update was applied. Lower "
                "optim.learning_rate, or look at metrics.jsonl for where it began."
            )


def _describe(record: Record, tokens_per_second: float) -> str:
    line = f"loss {record['loss']:.4f}  {tokens_per_second:,.0f} tok/s"
    if "saturated" in record:
        line += (
            f"  FP8: sat {record['saturated']:.2%} under {record['underflow']:.2%}"
            f" nonfinite {record['nonfinite']:.0f} age {record['scale_age']:.0f}"
        )
    return line
