"""Interleaved timing: cases take turns, so that a busy machine slows all of them alike.

Also what the sections of `python -m benchmarks` have in common: options, table and record.

Public names: `interleave`, `median_ms`, `median_ratio`, `format_table`, `section_parser`,
`report`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.machine import ALLOCATORS, describe_allocator, describe_machine, write_json

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


def section_parser(name: str, description: str | None, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with the options that all sections have.

    Args:
      name: the module, as in ``benchmarks.NAME``.
      description: its docstring.
      rounds: default of ``--rounds``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of every case")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="raised")
    parser.add_argument("--json", default=f"runs/benchmarks/{name}.json")
    return parser


def report(
    path: str,
    rows: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, Times] | None = None,
    **more: Any,
) -> None:
    """Prints the rows of a section, a table for each group, and writes its record.

    Args:
      path: the JSON file.
      rows: each with its ``group`` and its ``case``; rows of a group have equal keys.
      seconds: times of all rounds, by group and case.
      **more: further entries of the record.
    """
    for group in dict.fromkeys(row["group"] for row in rows):
        print(f"\n{group}; allocator: {describe_allocator()}")
        shown = [row for row in rows if row["group"] == group]
        print(format_table([{k: v for k, v in r.items() if k != "group"} for r in shown]))
    record = {"machine": describe_machine(), "rows": list(rows), "seconds": dict(seconds or {})}
    write_json(Path(path), {**record, **more})
    print(f"\nWritten to {path}.", flush=True)


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
