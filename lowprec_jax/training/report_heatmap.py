"""Heat maps: every FP8 operand of the model over the steps of a run.

Public names: `operand_figure`, `sqnr_figure`, `Operand`, `parse_operand`.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from lowprec_jax.training.report_data import OPERAND_COLUMNS, Array, Run
from lowprec_jax.training.report_panels import step_axis
from lowprec_jax.training.report_series import time_columns
from lowprec_jax.training.report_theme import BAD, COLORS, LEVEL, figure

__all__ = ["ROLES", "Operand", "operand_figure", "parse_operand", "sqnr_figure"]

ROLES = {"lhs": "inputs", "rhs": "weights", "output_grad": "output gradients"}

_LEAST = 1e-3  # percent; less has the colour of none
_LABELS = 40  # rows that can each have a label
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Operand(NamedTuple):
    """What the name of an operand says: ``"blocks/mlp/down[2] output_grad"``.

    Attributes:
      role: a key of `ROLES`; "" if the name has none.
      layer: number of the block; -1 outside of blocks.
      site: path without the number of the layer, and without the ``blocks`` that all share.
    """

    role: str
    layer: int
    site: str


def parse_operand(name: str) -> Operand:
    """Takes the name of an operand apart; a model of unrolled layers has ``blocks/2/mlp/down``."""
    path, _, role = name.rpartition(" ")
    if role not in ROLES:
        path, role = name, ""
    found = re.search(r"\[(\d+)\]|(?<![^/])(\d+)(?![^/])", path)
    if found is None:
        return Operand(role, -1, path.removeprefix("blocks/"))
    site = (path[: found.start()] + path[found.end() :]).replace("//", "/").strip("/")
    return Operand(role, int(found[1] or found[2]), site.removeprefix("blocks/"))


def operand_figure(run: Run) -> Any | None:
    """Saturated, underflowed and amax of each operand over steps; None without reports.

    A row of panels for each role; in it layers from the top, and the sites of each in the order of
    the log. A cell shows the largest value of the reports it stands for.
    """
    if not run.operands.names:
        return None
    columns = time_columns(run.operands)
    operands = [parse_operand(name) for name in run.operands.names]
    roles = [role for role in (*ROLES, "") if any(o.role == role for o in operands)]
    rows = [_rows(operands, role) for role in roles]
    height = min(max(0.125 * max(map(len, rows)), 0.9), 4.5)
    drawn = figure(height * len(roles) + 1.1)
    grid = drawn.subplots(len(roles), 3, sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(("saturated", "underflow")):
        values = columns.highest[..., OPERAND_COLUMNS.index(name)]
        for axes, found in zip(grid[:, column], rows, strict=True):
            mesh = _fractions(axes, columns.edges, values[:, found])
        bar = drawn.colorbar(mesh, ax=list(grid[:, column]), location="top", aspect=36, pad=0.01)
        _fraction_bar(bar, name, run.config.get("health"))
    amax = columns.highest[..., OPERAND_COLUMNS.index("amax")]
    for axes, found in zip(grid[:, 2], rows, strict=True):
        _levels(drawn, axes, columns.edges, amax[:, found])
    grid[0, 2].set_title("largest magnitude (amax)", fontsize=8.5)
    for axes, role, found in zip(grid[:, 0], roles, rows, strict=True):
        axes.set_ylabel(ROLES.get(role, "operands"), fontweight="bold", color=COLORS["ink"])
        _label_rows(axes, [operands[i] for i in found])
    for axes in grid[-1]:
        _few_steps(axes, run)
    return drawn


def sqnr_figure(run: Run) -> Any | None:
    """Signal to quantization noise of each gradient over steps, in dB; None if not measured.

    Below it the loss in FP8 less that of the same weights in high precision, if it was measured.
    """
    sqnr, gap = run.sqnr, run.column("loss_gap")
    if not sqnr.names:
        return None
    operands = [parse_operand(name) for name in sqnr.names]
    operands = [o._replace(site=o.site.removesuffix("/kernel")) for o in operands]
    rows = sorted(range(len(operands)), key=lambda i: (operands[i].layer, i))
    columns = time_columns(sqnr)
    heights = [min(max(0.16 * len(rows), 0.8), 5.0), *([1.1] if len(gap.steps) else [])]
    drawn = figure(sum(heights) + 0.9)
    grid = drawn.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    lowest = np.ma.masked_invalid(columns.lowest[:, rows, 0])
    mesh = _mesh(grid[0], columns.edges, lowest, cmap=LEVEL)
    _label_rows(grid[0], [operands[i] for i in rows])
    _dress_bar(drawn.colorbar(mesh, ax=grid[0], location="top", aspect=90, pad=0.02))
    if len(gap.steps):
        known = np.isfinite(gap.values)
        grid[1].plot(gap.steps[known], gap.values[known], color=COLORS["violet"], marker=".")
        grid[1].set_ylabel("loss gap (nats)")
        step_axis(grid[1], run)
    step_axis(grid[0], run, labelled=not len(gap.steps))
    return drawn


def _fractions(axes: Any, edges: Array, values: Array) -> Any:
    """Fractions [columns, rows] in percent on a logarithmic scale; below it counts as none."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    percent = np.ma.maximum(100 * np.ma.masked_invalid(values), _LEAST)
    colors = LinearSegmentedColormap.from_list("bad", BAD)
    return _mesh(axes, edges, percent, cmap=colors, norm=LogNorm(_LEAST, 100))


def _fraction_bar(bar: Any, name: str, limits: Any) -> None:
    """The scale of `_fractions`, with the limit of the alarm if the config has one."""
    bar.set_ticks([_LEAST, 1e-2, 1e-1, 1, 10, 100], labels=["0", "0.01", "0.1", "1", "10", "100"])
    limit = limits.get(name) if isinstance(limits, dict) else None
    text = f"{name} (% of elements)"
    if isinstance(limit, int | float) and _LEAST < 100 * limit < 100:
        bar.ax.axvline(100 * limit, color=COLORS["panel"], linewidth=1.5)
        text = f"{name} (% of elements; alarm above {100 * limit:g})"
    _dress_bar(bar)
    bar.ax.set_title(text, fontsize=8.5)


def _levels(drawn: Any, axes: Any, edges: Array, values: Array) -> None:
    """Magnitudes [columns, rows] on a scale of powers of two of their own."""
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.ma.masked_invalid(np.log2(values))
    known = levels.compressed()
    low, high = np.quantile(known, (0.01, 0.99)) if len(known) else (0.0, 1.0)
    low, high = np.floor(low), max(np.ceil(high), np.floor(low) + 1)
    mesh = _mesh(axes, edges, levels, cmap=LEVEL, vmin=low, vmax=high)
    bar = drawn.colorbar(mesh, ax=axes, aspect=24, pad=0.02)
    ticks = np.arange(low, high + 1, max(1, -(-(high - low) // 5)))
    bar.set_ticks(ticks, labels=["2" + str(int(t)).translate(_SUPERSCRIPTS) for t in ticks])
    _dress_bar(bar)


def _mesh(axes: Any, edges: Array, values: Any, **colors: Any) -> Any:
    """Values [columns, rows] as cells, the first row on top; a picture inside an SVG."""
    rows = values.shape[1]
    mesh = axes.pcolormesh(edges, np.arange(rows + 1), values.T, rasterized=True, **colors)
    axes.grid(False)
    axes.set_facecolor(COLORS["blank"])
    axes.set_ylim(rows, 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    return mesh


def _dress_bar(bar: Any) -> None:
    bar.ax.tick_params(length=0, labelsize=7)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _few_steps(axes: Any, run: Run) -> None:
    """As in the curves, with few ticks: the panels are narrow."""
    step_axis(axes, run)
    axes.locator_params(axis="x", nbins=5)


def _rows(operands: list[Operand], role: str) -> list[int]:
    """Indices of the operands of a role, by layer; within it in the order of the log."""
    found = [i for i, operand in enumerate(operands) if operand.role == role]
    return sorted(found, key=lambda i: operands[i].layer)


def _label_rows(axes: Any, operands: list[Operand]) -> None:
    """Layer and site of each row; of many rows only some layers."""
    first = [i for i, o in enumerate(operands) if i == 0 or o.layer != operands[i - 1].layer]
    if len(operands) <= _LABELS:
        labels = [f"{o.layer} {o.site}" if o.layer >= 0 else o.site for o in operands]
        axes.set_yticks(np.arange(len(operands)) + 0.5, labels, fontsize=7)
        return
    some = first[:: -(-len(first) // _LABELS)]
    labels = [f"layer {operands[i].layer}" if operands[i].layer >= 0 else "" for i in some]
    axes.set_yticks(np.array(some) + 0.5, labels, fontsize=7)
