"""What is done about a step that went wrong: skip, roll back, stop. Imports no JAX.

The ladder. A non-finite update is skipped on the device; a loss far above the last ones is a spike.
Several of one kind without a sound step between them: the run goes back to its last good checkpoint
and on with later data. Several rollbacks without progress: it stops with a report.

No run goes on for ever. Rollbacks are forgiven, all at once, only by a checkpoint `window` steps
beyond the farthest step that ever failed; so there are at most ``steps / window`` pardons, and
`max_rollbacks` between two of them. Public names: `Guard`, `Rollback`, `Verdict`.
"""

import enum
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from lowprec_jax.errors import UserError
from lowprec_jax.training.guard_config import GuardConfig
from lowprec_jax.training.spikes import SpikeRule

__all__ = ["Guard", "Rollback", "Verdict"]


class Verdict(enum.Enum):
    """What the guard says to a step.

    OK: sound.
    SKIPPED: loss or gradients were not finite, and the update was not applied.
    SPIKE: the loss is far above the last ones; the update was applied.
    ROLL_BACK: restore the last good checkpoint, go on with later data, call `Guard.rolled_back`.
    STOP: end the run with `Guard.report`.
    """

    OK = "ok"
    SKIPPED = "skipped"
    SPIKE = "spike"
    ROLL_BACK = "roll_back"
    STOP = "stop"


class Rollback(NamedTuple):
    """From the step that failed to that of the checkpoint, and why."""

    step: int
    to: int
    reason: str


class Guard:
    """Judges every step of a run by its record.

    Its verdicts depend on the records alone: all processes of a run come to the same, and so does a
    resumed one.

    Args:
      config: the limits.

    Attributes:
      step: the last step it has judged; when it asks to go back, the one that failed.
      reason: for people, why the last verdict.
      limit: what the last loss was measured against; None while too few losses are known.
    """

    def __init__(self, config: GuardConfig):
        self._config = config
        self._spikes = SpikeRule(config.sigma, config.window, config.min_window)
        self.step = 0
        self._bad = {Verdict.SKIPPED: 0, Verdict.SPIKE: 0}  # since the last sound step
        self._rollbacks: list[Rollback] = []  # not forgiven
        self._forgiven = 0
        self._farthest = 0  # step that was ever rolled back from
        self._tried = False  # the newest checkpoint has been rolled back to
        self._standing: Verdict | None = None
        self.reason = ""
        self.limit: float | None = None

    def observe(self, record: Mapping[str, Any]) -> Verdict:
        """Judges a step.

        A verdict to roll back or to stop stands until `rolled_back` is called; steps that were
        already under way are not looked at.

        Args:
          record: of a step, with "step", "loss" (nats; None if not finite), "grad_norm" and
            "skipped". Every step comes once, in order.

        Raises:
          ValueError: the step is not later than the last one.
        """
        if self._standing is not None:
            return self._standing
        step, loss = record["step"], record["loss"]
        if step <= self.step:
            raise ValueError(
                f"Guard.observe: step {step} after step {self.step}; every step comes once, in "
                "order. Call rolled_back when the run goes back."
            )
        self.step, self.limit = step, self._spikes.limit()
        if record["skipped"]:
            numbers = f"loss {_text(loss)}, gradient norm {_text(record['grad_norm'])}"
            return self._bad_step(Verdict.SKIPPED, f"update skipped as not finite ({numbers})")
        if not _is_finite(loss):
            return self._bad_step(Verdict.SPIKE, f"loss {_text(loss)} of an update that was made")
        if self.limit is not None and loss > self.limit:
            known = f"{self._config.sigma:g} sigma over the last {len(self._spikes.losses)}"
            what = f"loss {loss:.4g} is above {self.limit:.4g}, {known}"
            return self._bad_step(Verdict.SPIKE, what)
        self._bad = dict.fromkeys(self._bad, 0)
        self._spikes.extend([loss])
        self.reason = f"loss {loss:.4g} is sound (limit {_text(self.limit)})"
        return Verdict.OK

    @property
    def sound(self) -> bool:
        """Whether the last step was; while it was not, no checkpoint should be saved."""
        return not any(self._bad.values())

    @property
    def skip_checkpoints(self) -> int:
        """How many of the good checkpoints a rollback passes over, the newest first.

        1 when the run has been at the newest one before and no other was saved since: then that one
        may be what is wrong. The oldest there is has to do where nothing is left.
        """
        return int(self._tried)

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is being saved: call it before `state` is taken for it.

        Forgives the rollbacks if that is real progress: `window` steps beyond every failure.
        """
        self._tried = False
        if step >= self._farthest + self._config.window:
            self._forgiven += len(self._rollbacks)
            self._rollbacks.clear()

    def rolled_back(self, to_step: int, saved: Mapping[str, Any] | None = None) -> None:
        """The run has restored a checkpoint. The losses go back with it, the rollbacks do not.

        Args:
          to_step: step of the checkpoint.
          saved: `state` that it holds; None, as for the start of a run: no loss is known.

        Raises:
          UserError: `saved` is not from `state`.
        """
        at_that_time = Guard(self._config) if saved is None else self.restore(self._config, saved)
        self._rollbacks.append(Rollback(self.step, to_step, self.reason))
        self._farthest = max(self._farthest, self.step)
        self._spikes, self._bad = at_that_time._spikes, at_that_time._bad
        self.step, self._tried, self._standing = to_step, True, None

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON; of a size that does not grow with the run."""
        return {
            "step": self.step,
            "losses": self._spikes.losses,
            "skipped": self._bad[Verdict.SKIPPED],
            "spikes": self._bad[Verdict.SPIKE],
            "rollbacks": [list(rollback) for rollback in self._rollbacks],
            "forgiven": self._forgiven,
            "farthest": self._farthest,
            "tried": self._tried,
        }

    @classmethod
    def restore(cls, config: GuardConfig, state: Mapping[str, Any]) -> Self:
        """A guard that goes on where `state` was taken, under limits that may be others.

        Raises:
          UserError: `state` is not from `Guard.state`.
        """
        guard = cls(config)
        try:
            guard._spikes.extend(state["losses"])
            guard._bad = {
                Verdict.SKIPPED: int(state["skipped"]),
                Verdict.SPIKE: int(state["spikes"]),
            }
            guard._rollbacks = [Rollback(*rollback) for rollback in state["rollbacks"]]
            guard.step, guard._forgiven = int(state["step"]), int(state["forgiven"])
            guard._farthest, guard._tried = int(state["farthest"]), bool(state["tried"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The guard cannot be restored from {state!r} ({error!r}); give what Guard.state "
                "returned, or start with Guard(config)."
            ) from error
        return guard

    def report(self) -> str:
        """A paragraph for a run that ends here: what happened when, and what to try."""
        parts = [f"Step {self.step}: {self.reason}."]
        if self._rollbacks:
            each = "; ".join(f"from step {r.step} to {r.to} ({r.reason})" for r in self._rollbacks)
            parts.append(f"Rolled back without lasting progress: {each}.")
        if self._forgiven:
            parts.append(f"Rollbacks before that the run got over: {self._forgiven}.")
        if self._bad[Verdict.SKIPPED]:
            parts.append("Of the updates that were not finite none was applied.")
        parts.append(
            "To try: a lower optim.learning_rate or optim.clip_norm; guard.promote_steps, which "
            "trains suspected layers in high precision for a while; precision.recipe none, to see "
            "whether low precision is the cause."
        )
        if self._bad[Verdict.SPIKE]:
            parts.append(
                "If the loss has risen for good because the data became harder, raise guard.sigma "
                "or guard.max_spikes."
            )
        parts.append("events.jsonl and metrics.jsonl show where it began.")
        return " ".join(parts)

    def _bad_step(self, kind: Verdict, what: str) -> Verdict:
        """Counts a step that is not sound; one of the other kind does not end its row."""
        config = self._config
        most = config.max_skipped if kind is Verdict.SKIPPED else config.max_spikes
        self._bad[kind] += 1
        self.reason = f"{what} ({self._bad[kind]} of {most} before a rollback)"
        if self._bad[kind] < most:
            return kind
        self.reason = f"{what}, {most} in a row"
        if len(self._rollbacks) < config.max_rollbacks:
            self._standing = Verdict.ROLL_BACK
        else:
            self._standing = Verdict.STOP
            self.reason += f"; guard.max_rollbacks {config.max_rollbacks} is used up"
        return self._standing


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _text(value: float | None) -> str:
    """A number, or what stands for one that is not."""
    return "none" if value is None else f"{value:.4g}"
