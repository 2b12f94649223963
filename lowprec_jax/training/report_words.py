"""Numbers and events of a report in words. No markup.

Public names: `number`, `percent`, `duration`, `size`, `clock`, `describe`, `measure`, `flatten`.
"""

import math
import string
from typing import Any

from lowprec_jax.training.report_data import Record

__all__ = ["clock", "describe", "duration", "flatten", "measure", "number", "percent", "size"]

# What an event says; what it holds besides is added to it.
_SENTENCES = {
    "start": "recipe {recipe}",
    "resume": "recipe {recipe}",
    "phase": "from here on recipe {recipe}",
    "changed": "{changes}",
    "converted": "{messages}",
    "skip": "update not applied: loss {loss}, gradient norm {grad_norm}",
    "spike": "loss {loss}, above {limit}; gradient norm {grad_norm}",
    "rollback": "to step {to}: {reason}",
    "promotion": "{paths} in high precision until step {until}",
    "demotion": "{paths} with the recipe of the run again",
    "alarm": "{operand}: {what} {value}, above {limit}",
    "alarm_over": "{operand}: {what} {value}, limit {limit}",
    "bad_checkpoint": "{reason}",
    "stop": "{reason}",
    "early_stop": "best validation loss {best}",
}


def number(value: Any, digits: int = 4) -> str:
    """A number as a person writes it: 12,345 or 0.01234 or 1.2e-07; "n/a" for none.

    What is no number is shown as it is; the items of a list with commas.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if isinstance(value, list):
        return ", ".join(number(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: Any) -> str:
    """A fraction in percent; of anything else "n/a"."""
    return f"{number(100.0 * value, 3)} %" if _is_finite(value) else "n/a"


def duration(value: Any) -> str:
    """Seconds in the unit in which they are easy to read; of anything else "n/a"."""
    if not _is_finite(value):
        return "n/a"
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: Any) -> str:
    """Bytes in MiB or GiB; of anything else "n/a"."""
    if not _is_finite(value):
        return "n/a"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def clock(time: Any) -> str:
    """The ISO time of an event without fractions and zone."""
    return str(time)[:19].replace("T", " ") if time else ""


def describe(event: Record) -> str:
    """What an event says besides its kind; an unknown kind lists its values."""
    known = {k: v for k, v in event.items() if k not in ("time", "step", "event")}
    values = {k: number(v) for k, v in known.items()}
    values |= {k: measure(event, k) for k in ("value", "limit") if k in event and "what" in event}
    sentence = _SENTENCES.get(event["event"], "")
    told = [name for _, name, _, _ in string.Formatter().parse(sentence) if name]
    text = sentence.format(**{name: values.pop(name, "n/a") for name in told})
    rest = (f"{name}: {value}" for name, value in values.items() if known[name] not in (None, []))
    return "; ".join(filter(None, [text, *rest]))


def measure(event: Record, name: str) -> str:
    """A value of an alarm: a fraction in percent, an age in steps."""
    value, what = event.get(name), event.get("what")
    if what in ("saturated", "underflow"):
        return percent(value)
    return f"{number(value)} steps" if what in ("age", "scale_age") else number(value)


def flatten(values: Record, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names and text with units, which the ends of the names tell."""
    rows = []
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict):
            rows += flatten(value, f"{dotted}.")
        elif dotted.endswith("_bytes"):
            rows.append((dotted.removesuffix("_bytes"), size(value)))
        elif dotted.endswith("_seconds") or prefix == "seconds.":
            rows.append((dotted.removesuffix("_seconds"), duration(value)))
        else:
            rows.append((dotted, number(value) or "none"))
    return rows


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
