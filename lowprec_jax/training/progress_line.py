"""What a person watches while a run trains. Public name: `ProgressLine`."""

import time
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lowprec_jax.training.metrics_log import Record

__all__ = ["ProgressLine"]


class ProgressLine:
    """A bar with ETA; below it loss, speed and FP8 health with the worst operand.

    Without a terminal, or with `live` off, one plain line is printed every `every` steps.

    Args:
      console: where it is shown.
      start: completed steps at the start.
      steps: steps of the run.
      live: draw a bar, on a terminal.
      every: steps between plain lines.
    """

    def __init__(self, console: Console, start: int, steps: int, *, live: bool, every: int):
        self._console = console
        self._every, self._steps = every, steps
        self._validation = ""
        self._step_seconds = 0.0  # running mean
        self._shown = 0
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

    def message(self, text: str) -> None:
        """Says what happened, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, record: Record) -> None:
        """Shows a step."""
        step, seconds = record["step"], record["seconds"]
        mean = self._step_seconds
        self._step_seconds = 0.9 * mean + 0.1 * seconds if mean else seconds
        self._shown += 1
        tokens = record["tokens_per_second"] * seconds
        speed = _speed(record, tokens / self._step_seconds, self._step_seconds)
        line, health = f"{speed}{self._validation}", _health(record)
        if self._live is not None:
            self._text.plain = f"{line}\n{health}" if health else line
            self._bar.update(self._task, completed=step)
        elif step % self._every == 0 or step == self._steps:
            elapsed = time.perf_counter() - self._begin
            eta = elapsed / self._shown * (self._steps - step)
            health = f"  {health}" if health else ""
            self.message(f"step {step}/{self._steps}  {line}{health}  eta {eta:.0f} s")


def _speed(record: Record, tokens_per_second: float, step_seconds: float) -> str:
    line = f"loss {record['loss']:.4f}  {tokens_per_second:,.0f} tok/s  {_duration(step_seconds)}"
    if record.get("mfu") is not None:
        line += f"  MFU {record['mfu']:.1%}"
    return line


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms/step" if seconds < 1 else f"{seconds:.2f} s/step"


def _health(record: Record) -> str:
    if "saturated" not in record:
        return ""
    return (
        f"FP8: sat {record['saturated']:.2%} under {record['underflow']:.2%}"
        f" nonfinite {record['nonfinite']:.0f} age {record['scale_age']:.0f}"
        f" worst {record['worst']}"
    )
