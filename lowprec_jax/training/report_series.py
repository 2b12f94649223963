"""Long series made short enough to draw, without losing a spike. NumPy only.

Public names: `thin`, `smooth`, `window_of`, `Columns`, `time_columns`.
"""

from typing import NamedTuple

import numpy as np

from lowprec_jax.training.report_data import Array, Reports, Series

__all__ = ["Columns", "smooth", "thin", "time_columns", "window_of"]

POINTS = 1600  # of a curve: about two a pixel at the width of the page
COLUMNS = 160  # of a heat map


def thin(series: Series, points: int = POINTS) -> Series:
    """At most about `points` points: the lowest and the highest of each of equal stretches.

    A stretch without a number leaves one NaN, so that a line breaks there.
    """
    steps, values = series
    if len(steps) <= points:
        return series
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), points // 2):
        inside = values[part]
        if np.isnan(inside).all():
            kept.append(int(part[0]))
        else:
            kept += sorted({int(part[np.nanargmin(inside)]), int(part[np.nanargmax(inside)])})
    return Series(steps[kept], values[kept])


def window_of(count: int) -> int:
    """Steps of a running median of a series of so many: 1 %, or up to 21 of a short one; odd."""
    return max(count // 100, min(21, count // 8)) | 1


def smooth(series: Series, points: int = POINTS // 2) -> Series:
    """The running median over `window_of` steps, at no more than `points` of them.

    The median, because one spike does not move it, and with the window around its step, so that a
    jump stays where it is. The window is cut off at the ends; NaN counts for nothing and stays.
    """
    count, half = len(series.steps), window_of(len(series.steps)) // 2
    if not count:
        return series
    centers = np.unique(np.linspace(0, count - 1, min(count, points)).astype(int))
    padded = np.pad(series.values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)[centers]
    known = np.isfinite(series.values[centers])
    values = np.full(len(centers), np.nan)
    values[known] = np.nanmedian(windows[known], axis=1)
    return Series(series.steps[centers], values)


class Columns(NamedTuple):
    """Reports gathered into the columns of a heat map.

    Attributes:
      edges: steps between which each column lies, float64 [columns + 1].
      highest, lowest: of the reports of each column, float32 [columns, names, numbers]; NaN where
        nothing was reported.
    """

    edges: Array
    highest: Array
    lowest: Array


def time_columns(reports: Reports, columns: int = COLUMNS) -> Columns:
    """Gathers consecutive reports into at most `columns` columns of about equal time.

    A report speaks for the steps since the one before it, but for no more than twice the usual
    gap: the rest, such as a phase in high precision, becomes a column without numbers.

    Args:
      reports: one or more.
      columns: of the result.
    """
    steps = reports.steps.astype(float)
    gaps = np.diff(steps)
    usual = float(np.median(gaps)) if len(gaps) else max(float(steps[0]), 1.0)
    width = max(usual, (steps[-1] - steps[0] + usual) / columns)
    bins = ((steps - steps[0] + usual / 2) // width).astype(int)
    starts = np.flatnonzero(np.r_[True, np.diff(bins) > 0])
    edges, highest, lowest = [max(steps[0] - usual, 0.0)], [], []
    blank = np.full(reports.values.shape[1:], np.nan, np.float32)
    for first, end in zip(starts, np.r_[starts[1:], len(steps)], strict=True):
        if steps[first] - edges[-1] > 2 * usual:
            edges.append(steps[first] - usual)
            highest.append(blank)
            lowest.append(blank)
        edges.append(steps[end - 1])
        part = reports.values[first:end]
        highest.append(np.fmax.reduce(part))
        lowest.append(np.fmin.reduce(part))
    return Columns(np.array(edges), np.stack(highest), np.stack(lowest))
