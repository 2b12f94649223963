"""From metrics on the device to records, one step late.

Public names: `StepReader`, `step_record`.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lowprec_jax.state import summarize
from lowprec_jax.training.efficiency import Clock
from lowprec_jax.training.metrics_log import LOGGED_COLUMNS, MetricsLog, Record
from lowprec_jax.training.progress_line import ProgressLine
from lowprec_jax.training.step import StepMetrics

__all__ = ["StepReader", "step_record"]


class _Started(NamedTuple):
    """The metrics of a step, with what was in force when it was started."""

    step: int
    metrics: StepMetrics
    names: Sequence[str]
    recipe: str
    ideal_seconds: float | None
    also: Record


class StepReader:
    """Reads metrics one step late, so that the device never waits; logs and shows them.

    `names`, `recipe` and `ideal_seconds` can be set while a run goes on, where its precision
    changes; they hold for the steps that are started afterwards.

    Args:
      names: names of the operands, see `step_record`.
      log: where records go.
      line: what shows them.
      tokens: tokens of a step.
      recipe: name of the recipe in force.
      ideal_seconds: of a step, see `lowprec_jax.training.efficiency.ideal_seconds`; None: the MFU
        is not known.
      operands_every: steps between tables of all operands; 0: none.
      clock: where the time of the run is counted. A step has the time that was spent on "step" and
        "data" since the last record, so that evaluations and the like stay out of it. None: a clock
        of its own, for which all time is that of steps.

    Attributes:
      seconds: of each step that was read, those of steps that were undone included.
    """

    def __init__(
        self,
        names: Sequence[str],
        log: MetricsLog,
        line: ProgressLine,
        *,
        tokens: int,
        recipe: str = "",
        ideal_seconds: float | None = None,
        operands_every: int = 0,
        clock: Clock | None = None,
    ):
        self.names, self.recipe, self.ideal_seconds = names, recipe, ideal_seconds
        self.tokens = tokens
        self.seconds = array("d")
        self._log, self._line = log, line
        self._operands_every = operands_every
        self._clock = clock or Clock("step")
        self._mark = self._clock.seconds()
        self._unread: _Started | None = None
        self._read: _Started | None = None
        # Seconds of the steps from this one on that brought the run further.
        self._first, self._productive = 0, array("d")

    def next(self, step: int, metrics: StepMetrics, also: Record | None = None) -> Record | None:
        """Takes the metrics of a step that has just been started; reads those before it.

        Args:
          step: number of the step, from 1.
          metrics: on the device.
          also: more for its record, such as "sqnr".

        Returns:
          The record of the step before, None if that has been read.
        """
        record = self.finish()
        self._unread = _Started(
            step, metrics, self.names, self.recipe, self.ideal_seconds, also or {}
        )
        return record

    def finish(self) -> Record | None:
        """Waits for the newest metrics and returns their record, None if that has been read."""
        if self._unread is None:
            return None
        self._read, self._unread = self._unread, None
        started = self._read
        record = step_record(started.step, started.metrics, started.names)
        computing, waiting = self._spent()
        seconds = computing + waiting
        record |= {
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_seconds": waiting,
            "mfu": started.ideal_seconds / seconds if started.ideal_seconds else None,
            "recipe": started.recipe,
        }
        due = self._operands_every and started.step % self._operands_every == 0
        if due and (operands := self.operands()):
            record["operands"] = operands
        record |= started.also
        self._account(record, computing)
        self._log.write(record)
        self._line.update(record)
        return record

    def operands(self) -> dict[str, list[float]]:
        """Health of all operands in the step that was read last, due or not.

        Returns:
          ``{name: [amax, scale, saturated, underflow, nonfinite, age]}``, see
          `lowprec_jax.state.operand_table`; empty where nothing is quantized.
        """
        if self._read is None or self._read.metrics.operands is None:
            return {}
        table = np.asarray(jax.device_get(self._read.metrics.operands))[:, : len(LOGGED_COLUMNS)]
        # By its shortest text, which names the same float32, a number takes half the place on disk.
        rows = [[float(str(x)) for x in row] for row in table]
        return dict(zip(self._read.names, rows, strict=True))

    def rewind(self, step: int) -> None:
        """Forgets the step in flight, and counts the time of all after `step` as lost.

        For a rollback; the next step is ``step + 1``. The log is rewound on its own.
        """
        self._unread = None
        kept = max(step + 1 - self._first, 0)
        self._clock.lose(self._spent()[0] + sum(self._productive[kept:]))
        del self._productive[kept:]

    def _spent(self) -> tuple[float, float]:
        """Seconds on steps, lost ones too, and on "data" since the last call."""
        before, self._mark = self._mark, self._clock.seconds()
        spent = {activity: self._mark[activity] - before[activity] for activity in before}
        return spent["step"] + spent["lost"], spent["data"]

    def _account(self, record: Record, computing: float) -> None:
        self.seconds.append(record["seconds"])
        if not self._productive:
            self._first = record["step"]
        if record["skipped"]:
            self._clock.lose(computing)
        self._productive.append(0.0 if record["skipped"] else computing)


def step_record(step: int, metrics: StepMetrics, names: Sequence[str]) -> Record:
    """A step as plain numbers; waits until the device has computed them.

    Args:
      step: number of the step, from 1.
      metrics: from the training step.
      names: `operand_names` of the model.
    """
    loss, grad_norm, skipped, table = jax.device_get(
        (metrics.loss, metrics.grad_norm, metrics.skipped, metrics.operands)
    )
    record = {
        "step": step,
        "loss": float(loss),
        "grad_norm": float(grad_norm),
        "skipped": int(skipped),
    }
    return record if table is None else record | summarize(np.asarray(table), names)._asdict()
