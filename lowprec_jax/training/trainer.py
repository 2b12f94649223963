"""The steps of a run, and what happens between them. Public name: `Trainer`."""

from typing import Any

import jax
import numpy as np

from lowprec_jax import data
from lowprec_jax.errors import TrainingFailedError, UserError
from lowprec_jax.training.checkpoint import Checkpoints, Found
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.efficiency import Clock
from lowprec_jax.training.guard import Verdict
from lowprec_jax.training.memory import Memory
from lowprec_jax.training.metrics_log import Record
from lowprec_jax.training.profile_window import ProfileWindow
from lowprec_jax.training.programs import Programs, ProgramTable
from lowprec_jax.training.promotion import suspects
from lowprec_jax.training.resume import refuse_changes
from lowprec_jax.training.run_log import RunLog
from lowprec_jax.training.shadow import sqnr_record
from lowprec_jax.training.signals import StopRequest
from lowprec_jax.training.step import Batch, TrainState
from lowprec_jax.training.switch import read_state, switch_state
from lowprec_jax.training.watchdog import Watchdog

__all__ = ["Trainer"]

Event = tuple[str, dict[str, Any]]


class Trainer:
    """Trains, evaluates, saves, and goes back where a step went wrong.

    Everything that decides the next step is in a checkpoint: the arrays of the state, and the
    `Memory` in its manifest.

    Args:
      config: the run.
      table: the compiled programs.
      batches: batches of the training text, a function of their number.
      checkpoints: where states are saved.
      stop: signals.
      clock: where time is counted.

    Attributes:
      state: the training state.
      programs: what it runs on.
      completed: completed steps.
      memory: what else decides the next step.
    """

    state: TrainState
    programs: Programs

    def __init__(
        self,
        config: TrainConfig,
        table: ProgramTable,
        batches: data.Batches,
        checkpoints: Checkpoints,
        stop: StopRequest,
        clock: Clock,
    ):
        self.config = config
        self._table, self._batches, self._checkpoints = table, batches, checkpoints
        self._stop, self._clock = stop, clock
        self.completed = 0
        self.memory = Memory(config)
        self._promoted: frozenset[str] = frozenset()
        self._verdict = Verdict.OK
        self._owes_save = False
        # Emulated devices deadlock at random if the steps of several devices pile up.
        self._waits = config.mesh.size > 1 and jax.devices()[0].platform == "cpu"

    # Where a run starts.

    def begin(self) -> list[Event]:
        """A fresh state with calibrated scales.

        Returns:
          Events ``(kind, fields)`` for the log.
        """
        self.completed, self.memory.validation_losses = 0, []
        self.programs = self._programs()
        with self._clock.measure("compile"):
            self.state = self.programs.init()
            if self.programs.names:
                self.state = self.programs.calibrate(self.state, self._load())
        return [("start", {"recipe": self.programs.precision.recipe})]

    def resume(self) -> list[Event]:
        """The newest good checkpoint.

        Returns:
          Events: what is damaged, changed, converted.

        Raises:
          UserError: there is none, it is complete, or of a run with other options.
        """
        found, where = self._checkpoints.newest(), self.config.run_path
        if found is None:
            raise UserError(
                f"No checkpoint to resume from in {where}/checkpoints. Give the run_dir of a run "
                f"that has one, or delete {where} and start without --resume."
            )
        done, about = found.manifest.step, found.manifest.about
        changed = refuse_changes(about["config"], self.config)
        if done >= self.config.steps:
            raise UserError(
                f"The run in {where} has completed {done} of {self.config.steps} steps. Give "
                f"--steps more than {done} to train on."
            )
        self.memory = Memory.restore(self.config, about)
        converted = self._restore(found)
        # A damaged one would count among the newest that stay, in the place of a good one.
        self._checkpoints.forget_after(done)
        events: list[Event] = [("bad_checkpoint", {"reason": text}) for text in found.damaged]
        events.append(("resume", {"recipe": self.programs.precision.recipe}))
        events += [("changed", {"changes": changed})] if changed else []
        events += [("converted", {"messages": converted})] if converted else []
        return events

    # The steps.

    def run(self, log: RunLog, watchdog: Watchdog, profile: ProfileWindow) -> str:
        """Trains until the steps are completed.

        Returns:
          "completed", "stopped early", or the name of a signal: that ends the run after the step in
          progress, with a checkpoint.

        Raises:
          TrainingFailedError: it went wrong more often than the guard allows.
          UserError: a checkpoint could not be written.
        """
        self._log, self._watchdog, self._profile = log, watchdog, profile
        log.precision(self.programs)
        while self.completed < self.config.steps:
            watchdog.beat(f"step {self.completed + 1}")
            self._enter_precision()
            self._step()
            if self._verdict in (Verdict.ROLL_BACK, Verdict.STOP):
                self._go_back()
                continue
            self._checkpoints.check()
            if self.memory.patience_is_over:
                log.event(self.completed, "early_stop", best=min(self.memory.validation_losses))
                return "stopped early"
            if self.completed < self.config.steps and self._stop.agreed(self.completed):
                return self._end_for_signal()
        return "completed"

    def _step(self) -> None:
        """One step, and the evaluation and the checkpoint that are due after it."""
        config, step = self.config, self.completed + 1
        with self._clock.measure("data"):
            batch = self._load()
        also = self._compare(step, batch)
        with self._clock.measure("step"), self._profile.step(step, self.state):
            self.state, metrics = self.programs.step(self.state, batch)
            self.completed = step
            self.memory.next_batch += 1
            self._judge(self._log.reader.next(step, metrics, also))
            at_end = step == config.steps
            evaluates = at_end or _due(step, config.eval_every)
            saves = at_end or self._owes_save or _due(step, config.checkpoint_every)
            if evaluates or saves or self._waits:
                self._judge(self._log.reader.finish())
        if self._verdict in (Verdict.ROLL_BACK, Verdict.STOP):
            return
        loss = self._evaluate() if evaluates else None
        best = loss is not None and config.keep_best and loss <= min(self.memory.validation_losses)
        if saves or best:
            self._save(loss, at_end=at_end)

    def _compare(self, step: int, batch: Batch) -> Record:
        """The gradients of a sampled step against those in high precision."""
        if self.programs.shadow is None or not _due(step, self.config.health.sqnr_every):
            return {}
        with self._clock.measure("other"):
            state = self.state
            found = self.programs.shadow(state.params, state.scaling, batch)
            return {"sqnr": sqnr_record(found.sqnr), "loss_gap": float(found.loss_difference)}

    def _judge(self, record: Record | None) -> None:
        """Lets guard and alarms see a record."""
        if record is None:
            return
        step, guard = record["step"], self.memory.guard
        self._verdict = guard.observe(record)
        if not guard.sound:
            kind = "skip" if record["skipped"] else "spike"
            numbers = {"loss": record["loss"], "grad_norm": record["grad_norm"]}
            self._log.event(step, kind, guard.reason, **numbers, limit=guard.limit)
        if "operands" in record:
            self._hear(step, record["operands"])

    def _hear(self, step: int, operands: Record) -> None:
        """Logs the alarms that a report of all operands raises and ends."""
        for alarm in self.memory.alarms.check(step, operands):
            self._log.event(step, alarm.pop("kind"), **alarm)

    def _evaluate(self) -> float | None:
        """The validation loss; None if a signal came before it was known. The last one is made."""

        def interrupted() -> bool:
            self._watchdog.beat(f"the evaluation after step {self.completed}")
            return self._stop.here and self.completed < self.config.steps

        with self._clock.measure("evaluation"):
            loss = self.programs.evaluate(self.state, interrupted)
        if loss is not None:
            self.memory.validation_losses.append(loss)
            self._log.validation(self.completed, loss)
        return loss

    def _end_for_signal(self) -> str:
        """Saves what is there, verified, because a signal came."""
        self._judge(self._log.reader.finish())
        if self.completed > 0 and self._verdict not in (Verdict.ROLL_BACK, Verdict.STOP):
            self._save(at_end=True)
            self._checkpoints.wait()
        self._log.event(self.completed, "stop", reason=self._stop.name)
        return self._stop.name

    # Checkpoints.

    def _save(self, validation_loss: float | None = None, *, at_end: bool = False) -> None:
        """Saves, unless the last step was not sound: then after the next that is."""
        self._owes_save = not (self.memory.guard.sound or at_end)
        if self._owes_save:
            return
        self.memory.guard.saved(self.completed)
        with self._clock.measure("checkpoint"):
            self._checkpoints.save(self.state, self.memory.state(), validation_loss=validation_loss)
        fields: dict[str, Any] = {}
        if validation_loss is not None:
            fields["validation_loss"] = validation_loss
        self._log.event(self.completed, "checkpoint", **fields)

    def _go_back(self) -> None:
        """Restores the last good state and goes on with the data after what went wrong."""
        guard, log = self.memory.guard, self._log
        failed, reason = guard.step, guard.reason
        if self._verdict is Verdict.STOP:
            log.event(failed, "stop", reason=reason)
            raise TrainingFailedError(guard.report())
        layers = suspects(log.reader.operands(), saturated=self.config.health.saturated)
        newest = self._checkpoints.newest
        found = newest(skip=guard.skip_checkpoints) or newest()
        to = found.manifest.step if found else 0
        guard.rolled_back(to, found.manifest.about["guard"] if found else None)
        promoted = self.memory.promotion.promote(layers, to)
        with self._watchdog.paused(f"the rollback to step {to}"):
            if found:
                self._restore(found)
            else:
                self.begin()
            self._checkpoints.forget_after(to)
        log.rewind(to)
        log.precision(self.programs)
        self._verdict, self._owes_save = Verdict.OK, False
        message = f"Step {failed}: {reason}. Back to step {to}, and on with later data."
        log.event(failed, "rollback", message, to=to, reason=reason, operands=layers)
        for path, until in promoted.items():
            log.event(to, "promotion", paths=[path], until=until)

    def _restore(self, found: Found) -> list[str]:
        """Puts a checkpoint in the place of the state; returns what was converted."""
        self.completed = found.manifest.step
        losses = found.manifest.about["validation_losses"]
        self.memory.validation_losses = list(losses)
        self.programs = self._programs()
        self.state, messages = read_state(self._checkpoints, found, self.programs, self._load)
        return messages

    # Precision.

    def _enter_precision(self) -> None:
        """Switches to the precision of the next step, with scales that are warm."""
        before, self.programs = self.programs, self._programs()
        promoted = self.memory.promotion.paths(self.completed)
        if demoted := sorted(self._promoted - promoted):
            self._log.event(self.completed, "demotion", paths=demoted)
        self._promoted = promoted
        if self.programs is before:
            return
        with self._watchdog.paused(f"the switch of precision before step {self.completed + 1}"):
            self.state = switch_state(self.state, self.programs, self._load)
        if not self.programs.names:
            self._hear(self.completed, {})  # no operands, no alarms
        self._log.precision(self.programs)
        self._log.event(self.completed, "phase", recipe=self.programs.precision.recipe)

    def _programs(self) -> Programs:
        """What runs the step after the completed ones."""
        with self._clock.measure("compile"):
            return self._table.at(self.completed, self.memory.promotion.paths(self.completed))

    def _load(self) -> Batch:
        """The next batch, on the devices; each host loads its rows."""

        def load(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            return self._batches.batch(self.memory.next_batch, rows)

        return self.programs.network.layout.load_batch(load, self.config.batch_size)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
