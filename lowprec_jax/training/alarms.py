"""Alarms on the health of quantized operands: raised once, and once over. Imports no JAX.

Public names: `Alarms`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from lowprec_jax.errors import UserError
from lowprec_jax.training.guard_config import HealthConfig

Event = dict[str, Any]
# An operand of a report: amax, scale, saturated, underflow, non-finite count, age of the scale.
Row = Sequence[float | None]

# An alarm is over at this part of its limit, so that a value at the limit does not flicker.
OVER = 0.5


class Alarms:
    """Compares reports of all operands with limits and says what has changed.

    The age of a scale alarms only while the amax has changed since the last report, or is unusable
    (zero, not finite): the scale of a frozen weight is old and right. An operand that a report no
    longer has (its layer went to high precision) has no alarm either.

    Args:
      config: the limits.

    Attributes:
      active: the alarms that are on and the step that raised each, by ``(operand, what)``: what is
        "saturated", "underflow", "nonfinite" or "scale_age".
    """

    def __init__(self, config: HealthConfig):
        self._limits = {
            "saturated": config.saturated,
            "underflow": config.underflow,
            "nonfinite": 0.0,
            "scale_age": float(config.scale_age),
        }
        self._amaxes: dict[str, float | None] = {}
        self.active: dict[tuple[str, str], int] = {}

    def check(self, step: int, operands: Mapping[str, Row]) -> list[Event]:
        """Takes a report and returns the alarms that it raises and ends.

        Args:
          step: the step of the report.
          operands: a row of `lowprec_jax.state.operand_table` for every operand, by name. A number
            that is not finite may be None, as in the metrics log.

        Returns:
          Events, with the keys kind ("alarm" or "alarm_over"), operand, what, value and limit; one
          that is over has the step that raised it under "since", and no value (None) where the
          operand has gone.
        """
        values = {name: self._values(name, row) for name, row in operands.items()}
        self._amaxes = {name: _finite(row[0]) for name, row in operands.items()}
        gone = sorted(key for key in self.active if key[0] not in values)
        events = [self._end(*key, None) for key in gone]
        for name, by_kind in values.items():
            for what, value in by_kind.items():
                limit = self._limits[what]
                if (name, what) not in self.active and value > limit:
                    events.append(self._begin(step, name, what, value))
                elif (name, what) in self.active and value <= OVER * limit:
                    events.append(self._end(name, what, value))
        return events

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        active = [[*key, since] for key, since in self.active.items()]
        return {"active": active, "amaxes": self._amaxes}

    @classmethod
    def restore(cls, config: HealthConfig, state: Mapping[str, Any]) -> Self:
        """Alarms that go on where `state` was taken, under limits that may be others.

        Raises:
          UserError: `state` is not from `Alarms.state`.
        """
        alarms = cls(config)
        try:
            alarms.active = {(name, what): int(since) for name, what, since in state["active"]}
            alarms._amaxes = dict(state["amaxes"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"Alarms cannot be restored from {state!r} ({error!r}); give what Alarms.state "
                "returned, or start with Alarms(config)."
            ) from error
        return alarms

    def _values(self, name: str, row: Row) -> dict[str, float]:
        amax, _, saturated, underflow, nonfinite, age = row
        frozen = bool(_finite(amax)) and self._amaxes.get(name) == amax
        values = {
            "saturated": saturated,
            "underflow": underflow,
            "nonfinite": nonfinite,
            "scale_age": 0.0 if frozen else age,
        }
        return {what: value or 0.0 for what, value in values.items()}

    def _begin(self, step: int, operand: str, what: str, value: float) -> Event:
        self.active[operand, what] = step
        return self._event("alarm", operand, what, value)

    def _end(self, operand: str, what: str, value: float | None) -> Event:
        since = self.active.pop((operand, what))
        return self._event("alarm_over", operand, what, value) | {"since": since}

    def _event(self, kind: str, operand: str, what: str, value: float | None) -> Event:
        limit = self._limits[what]
        return {"kind": kind, "operand": operand, "what": what, "value": value, "limit": limit}


def _finite(amax: float | None) -> float | None:
    return amax if amax is not None and math.isfinite(amax) else None
