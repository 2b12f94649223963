"""Interleaved timing: cases take turns, so that a busy machine slows all of them alike.

Public names: `interleave`, `median_ms`, `median_ratio`, `format_table`.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Times = dict[str, list[float]]


def interleave(cases: Mapping[str, Callable[[], Any]], rounds: int, inner: int = 1) -> Times:
    """Seconds per call of every case, one value a round.

    Args:
      cases: functions that were called before, so that nothing is compiled in the clock.
      rounds: how often every case takes its turn; every second round runs in reverse order.
      inner: calls of a turn, for cases too short to be timed one by one.
    """
    times: Times = {name: [] for name in cases}
    for turn in range(rounds):
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            for _ in range(inner):
                out = cases[name]()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / inner)
    return times


def median_ms(times: Sequence[float]) -> float:
    """Median in milliseconds."""
    return statistics.median(times) * 1e3


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of the ratio to the reference in the same round.

    Differs from: the ratio of two medians, which a load that comes and goes moves more.
    """
    return statistics.median(t / r for t, r in zip(times, reference, strict=True))


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text: words to the left, numbers to the right."""
    header = list(rows[0])
    cells = [header, *([_cell(row[key]) for key in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [isinstance(rows[0][key], str) for key in header]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 10 else _long(value)


def _long(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
