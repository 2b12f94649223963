"""Everything a run says while it trains: numbers, events, and the line a person watches.

Public name: `RunLog`.
"""

from typing import Any, Self

from rich.console import Console

from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.efficiency import Clock
from lowprec_jax.training.metrics_log import EventLog, MetricsLog
from lowprec_jax.training.programs import Programs
from lowprec_jax.training.progress_line import ProgressLine
from lowprec_jax.training.run_directory import RunDirectory
from lowprec_jax.training.step_reader import StepReader
from lowprec_jax.training.wandb_run import WandbRun


class RunLog:
    """The logs of a run. Use as a context manager around its steps.

    Args:
      config: the run.
      directory: its files.
      console: where people watch; quiet in all processes but the first.
      clock: where the time of the run is counted.
      completed: completed steps; what is logged of later ones is removed.
      wandb: the run at Weights & Biases, if any.

    Attributes:
      reader: takes the metrics of steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        console: Console,
        clock: Clock,
        *,
        completed: int,
        wandb: WandbRun | None = None,
    ):
        writes = directory.writes
        board = directory.path / "tensorboard"
        self._metrics = MetricsLog(directory.metrics, board, writes=writes, wandb=wandb)
        self._metrics.rewind(completed)
        self._events = EventLog(directory.events, writes=writes)
        self._line = ProgressLine(
            console, completed, config.steps, live=config.progress, every=config.log_every
        )
        self.reader = StepReader(
            [],
            self._metrics,
            self._line,
            tokens=config.batch_size * config.model.context,
            operands_every=config.health.every,
            clock=clock,
        )

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._line.__exit__(*error)
        self._metrics.close()
        self._events.close()

    def event(self, step: int, kind: str, message: str = "", **fields: Any) -> None:
        """Notes what happened after `step` completed steps, and says so if there is a message."""
        self._events.write(step, kind, **fields)
        if message:
            self._line.message(message)

    def precision(self, programs: Programs) -> None:
        """The steps that follow run on these programs."""
        reader = self.reader
        reader.names, reader.recipe = programs.names, programs.precision.recipe
        reader.ideal_seconds = programs.ideal_seconds

    def validation(self, step: int, loss: float) -> None:
        """Logs an evaluation."""
        self._metrics.write({"step": step, "validation_loss": loss})
        self._line.validation(loss)

    def rewind(self, step: int) -> None:
        """Goes back to a step: its later records are removed, events stay."""
        self.reader.rewind(step)
        self._metrics.rewind(step)
