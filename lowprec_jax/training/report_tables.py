"""What a report says in words and numbers: state, key figures, phases, events, alarms, operands.

Plain text, no markup. Public names: `state_of`, `figures_of`, `phase_rows`, `event_rows`,
`alarm_rows`, `operand_rows`, `time_rows`, `Figure`, `Table`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowprec_jax.training.report_data import OPERAND_COLUMNS, Run
from lowprec_jax.training.report_words import (
    clock,
    describe,
    duration,
    measure,
    number,
    percent,
    size,
)

__all__ = [
    "Figure",
    "Table",
    "alarm_rows",
    "event_rows",
    "figures_of",
    "operand_rows",
    "phase_rows",
    "state_of",
    "time_rows",
]

_ROWS = 200  # of a table; the files hold the rest

_MFU = (
    "model FLOPs utilization: the time that the matrix products of the model would take at the "
    "peak of the devices, those in FP8 at the FP8 peak and all others at the BF16 peak, over the "
    "time of a step; n/a where the peaks are not known, as on a CPU"
)


class Figure(NamedTuple):
    """A key figure: its name, its value with unit, and a remark."""

    name: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """Heads of the columns, rows of text, and what was left out."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def state_of(run: Run) -> tuple[str, str]:
    """How the run ended: one of "finished", "stopped", "unfinished", and a sentence.

    A summary of fewer steps than were logged is that of an earlier part of the run.
    """
    last = int(np.r_[run.steps[-1:], run.validation.steps[-1:]].max())
    after = run.summary.get("steps")
    current = bool(run.summary) and not (isinstance(after, int) and after < last)
    ended = [e for e in run.events if e["event"] in ("stop", "early_stop", "start", "resume")][-1:]
    kind = ended[0]["event"] if ended else ""
    if run.summary.get("stopped_by") and current:
        return "stopped", f"stopped by {run.summary['stopped_by']} after step {last:,}"
    if kind == "stop":
        reason = ended[0].get("reason") or "no reason given"
        return "stopped", f"stopped after step {last:,}: {reason}"
    if kind == "early_stop":
        return "finished", f"stopped early after step {last:,}: no better validation loss"
    if current:
        return "finished", f"finished after step {last:,}"
    total = run.config.get("steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    return "unfinished", f"unfinished: step {last:,}{of} is the last in the log"


def figures_of(run: Run) -> list[Figure]:
    """Key figures, from the summary of a run that has ended, else from the log."""
    summary = {} if state_of(run)[0] == "unfinished" else run.summary
    losses, validation = run.column("loss"), run.validation
    found = []
    if len(validation.steps):
        best = _best(run)
        found += [
            Figure("validation loss", number(summary.get("validation_loss", validation.values[-1])),
                   "nats per token, last"),
            Figure("best validation", number(float(validation.values[best])),
                   f"at step {validation.steps[best]:,}"),
        ]  # fmt: skip
    elif len(losses.steps):
        found.append(Figure("training loss", number(losses.values[-1]), "nats per token, last"))
    rate = summary.get("tokens_per_second", _median(run, "tokens_per_second"))
    found.append(Figure("tokens per second", number(rate), "at the median step"))
    seconds = summary.get("median_step_seconds", _median(run, "seconds"))
    waited = _median(run, "data_seconds")
    note = f"median; {duration(waited)} of it waiting for data" if waited is not None else "median"
    found.append(Figure("time of a step", duration(seconds), note))
    if len(run.column("mfu").steps) or "mfu" in summary:
        found.append(Figure("MFU", percent(summary.get("mfu", _median(run, "mfu"))), _MFU))
    for name, label, form, note in _FROM_SUMMARY:
        if summary.get(name) is not None:
            found.append(Figure(label, form(summary[name]), note))
    found.append(Figure("skipped updates", number(int(np.nansum(run.column("skipped").values)))))
    rollbacks = sum(e["event"] == "rollback" for e in run.events)
    return [*found, *([Figure("rollbacks", number(rollbacks))] if rollbacks else [])]


def phase_rows(run: Run) -> Table:
    """A row for each phase: recipe, steps, loss at its ends, median time of a step."""
    rows = []
    losses, seconds = run.columns.get("loss"), run.columns.get("seconds")
    for recipe, first, last in run.phases[-_ROWS:]:
        if not recipe:
            continue  # of a log that does not name it
        inside = (run.steps >= first) & (run.steps <= last)
        rows.append(
            (
                recipe,
                f"{first:,} to {last:,}",
                _ends(losses[inside]) if losses is not None else "n/a",
                duration(float(np.median(seconds[inside]))) if seconds is not None else "n/a",
            )
        )
    heads = ("recipe", "steps", "loss, first to last 10 steps", "median step")
    return Table(heads, rows, _left_out(len(run.phases)))


def time_rows(run: Run) -> Table:
    """Where the wall time went, the most first; empty without a summary."""
    spent = run.summary.get("seconds")
    spent = spent if isinstance(spent, dict) else {}
    known = {k: v for k, v in spent.items() if isinstance(v, int | float) and v > 0}
    total = sum(known.values())
    rows = [
        (name, duration(value), percent(value / total))
        for name, value in sorted(known.items(), key=lambda item: -item[1])
    ]
    lost = "Lost: steps that were skipped or rolled back." if "lost" in known else ""
    return Table(("activity", "time", "share"), rows, lost)


def event_rows(run: Run) -> Table:
    """What happened, in order, without the checkpoints that were written without trouble."""
    routine = sum(e["event"] == "checkpoint" for e in run.events)
    events = [e for e in run.events if e["event"] != "checkpoint"]
    rows = [
        (f"{e['step']:,}", e["event"].replace("_", " "), describe(e), clock(e.get("time")))
        for e in events[-_ROWS:]
    ]
    notes = [_left_out(len(events))]
    if routine:
        notes.append(f"Besides, {routine:,} checkpoints were written.")
    return Table(("step", "event", "what", "time (UTC)"), rows, " ".join(filter(None, notes)))


def alarm_rows(run: Run) -> Table:
    """Alarms on FP8 operands, newest first: what, its value and limit, from when to when."""
    alarms: list[list[Any]] = []
    active: dict[tuple[str, str], list[Any]] = {}
    for event in run.events:
        key = str(event.get("operand")), str(event.get("what"))
        if event["event"] == "alarm":
            active[key] = [event, None]
            alarms.append(active[key])
        elif event["event"] == "alarm_over" and key in active:
            active.pop(key)[1] = event["step"]
    rows = []
    for event, end in reversed(alarms[-_ROWS:]):
        value, limit = (measure(event, name) for name in ("value", "limit"))
        until = f"{end:,}" if end is not None else "still on"
        operand, what = str(event.get("operand")), str(event.get("what"))
        rows.append((operand, what.replace("_", " "), value, limit, f"{event['step']:,}", until))
    heads = ("operand", "what", "value", "limit", "from step", "to step")
    return Table(heads, rows, _left_out(len(alarms)))


def operand_rows(run: Run, count: int = 12) -> Table:
    """The last report of the operands that lose most, the worst first."""
    heads = ("operand", "saturated", "underflow", "non-finite", "amax", "scale", "scale moved")
    if not run.operands.names:
        return Table(heads, [])
    last = run.operands.values[-1]
    saturated, underflow = (OPERAND_COLUMNS.index(name) for name in ("saturated", "underflow"))
    lost = np.nan_to_num(last[:, saturated] + last[:, underflow], nan=-1.0)
    rows = []
    for i in np.argsort(-lost, kind="stable")[:count]:
        if lost[i] < 0:
            break
        amax, scale, clipped, flushed, nonfinite, age = map(float, last[i])
        rows.append(
            (
                run.operands.names[i],
                percent(clipped),
                percent(flushed),
                number(nonfinite),
                number(amax, 3),
                number(scale, 3),
                f"{number(age)} steps ago",
            )
        )
    reported = int((lost >= 0).sum())
    step = int(run.operands.steps[-1])
    return Table(heads, rows, f"{len(rows)} of {reported:,} operands, as reported at step {step:,}")


# Figures of the summary that stand above the curves; all of it is in a table at the end.
_FROM_SUMMARY: tuple[tuple[str, str, Callable[[Any], str], str], ...] = (
    ("goodput", "goodput", percent, "of the time: steps that the run kept"),
    ("compile_seconds", "compilation", duration, ""),
    ("total_seconds", "whole run", duration, ""),
    ("peak_device_bytes", "peak memory", size, "of the fullest device"),
    ("peak_process_bytes", "peak memory", size, "of the process"),
)


def _ends(losses: np.ndarray) -> str:
    known = losses[np.isfinite(losses)]
    if not len(known):
        return "n/a"
    return f"{known[:10].mean():.4f} to {known[-10:].mean():.4f}"


def _left_out(count: int) -> str:
    return f"The last {_ROWS} of {count:,}." if count > _ROWS else ""


def _best(run: Run) -> int:
    values = run.validation.values
    return int(np.argmin(np.where(np.isfinite(values), values, np.inf)))


def _median(run: Run, name: str) -> float | None:
    values = run.column(name).values
    return float(np.nanmedian(values)) if len(values) else None
