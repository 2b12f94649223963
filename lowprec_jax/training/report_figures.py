"""Figures of a run, made of panels: loss, speed, FP8 health, and an overview of all.

Public names: `loss_figure`, `speed_figure`, `health_figure`, `overview_figure`.
"""

from collections.abc import Callable
from typing import Any

from lowprec_jax.training.report_data import Run
from lowprec_jax.training.report_panels import (
    draw_age,
    draw_events,
    draw_health,
    draw_loss,
    draw_norm,
    draw_speed,
    draw_time,
    draw_utilization,
    event_kinds,
    step_axis,
)
from lowprec_jax.training.report_theme import COLORS, figure

__all__ = ["health_figure", "loss_figure", "overview_figure", "speed_figure"]


def loss_figure(run: Run) -> Any:
    """Training and validation loss, the gradient norm, and a lane of events."""
    kinds = event_kinds(run)
    norm = run.column("grad_norm")
    heights = [3.0, *([1.0] if len(norm.steps) else []), *([0.16 * len(kinds) + 0.1] * bool(kinds))]
    drawn = figure(sum(heights) + 0.7)
    grid = drawn.subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
    ).ravel()
    draw_loss(grid[0], run)
    if len(norm.steps):
        draw_norm(grid[1], run)
    if kinds:
        draw_events(grid[-1], run, kinds)
    step_axis(grid[-1], run)
    return drawn


def speed_figure(run: Run) -> Any | None:
    """Tokens per second, and where the time of a step goes; None if nothing was timed."""
    panels = _speed_panels(run)
    if not panels:
        return None
    drawn = figure(1.75 * len(panels) + 0.5)
    grid = drawn.subplots(len(panels), 1, sharex=True, squeeze=False).ravel()
    for axes, draw in zip(grid, panels, strict=True):
        draw(axes, run)
    step_axis(grid[-1], run)
    return drawn


def health_figure(run: Run) -> Any | None:
    """Saturated and underflowed elements, the age of the oldest scale; None without FP8."""
    if not len(run.column("saturated").steps):
        return None
    drawn = figure(3.6)
    grid = drawn.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    draw_health(grid[0], run)
    draw_age(grid[1], run)
    step_axis(grid[1], run)
    return drawn


def overview_figure(run: Run, title: str, lines: list[str]) -> Any:
    """One picture of the run: its numbers, the loss, the speed and the health.

    Args:
      run: the run.
      title: of the picture.
      lines: of text below the title.
    """
    top = 0.5 + 0.2 * len(lines)
    drawn = figure(7.4 + top, 12)
    head, body = drawn.subfigures(2, 1, height_ratios=[top, 7.4])
    head.text(0.012, 1 - 0.12 / top, title, va="top", fontsize=15, fontweight="bold")
    below = {"va": "top", "fontsize": 9, "color": COLORS["muted"], "linespacing": 1.5}
    head.text(0.012, 1 - 0.48 / top, "\n".join(lines), **below)
    kinds = event_kinds(run)
    lane = 0.16 * len(kinds) + 0.05
    grid = body.add_gridspec(3, 2, height_ratios=[3.2, lane, 2.3])
    loss = body.add_subplot(grid[0, :])
    draw_loss(loss, run)
    if kinds:
        events = body.add_subplot(grid[1, :], sharex=loss)
        draw_events(events, run, kinds)
        loss.tick_params(labelbottom=False)
    step_axis(loss, run, labelled=False)
    has_health = len(run.column("saturated").steps) > 0
    panels = _speed_panels(run)
    panels = [*panels[:1], draw_health] if has_health else panels[:2]
    for i, draw in enumerate(panels):
        axes = body.add_subplot(grid[2, :] if len(panels) == 1 else grid[2, i])
        draw(axes, run)
        step_axis(axes, run)
    return drawn


def _speed_panels(run: Run) -> list[Callable[[Any, Run], None]]:
    """What draws the speed, as far as it was logged."""
    panels = {"tokens_per_second": draw_speed, "seconds": draw_time, "mfu": draw_utilization}
    return [draw for name, draw in panels.items() if len(run.column(name).steps)]
