"""Panels of curves: each draws one thing of a run into its axes; phases shaded, events marked.

Public names: `draw_loss`, `draw_norm`, `draw_speed`, `draw_time`, `draw_utilization`,
`draw_health`, `draw_age`, `draw_events`, `event_kinds`, `step_axis`, `short`.
"""

from typing import Any, NamedTuple

import numpy as np

from lowprec_jax.training.report_data import Run, Series, Span
from lowprec_jax.training.report_series import smooth, thin, window_of
from lowprec_jax.training.report_theme import COLORS

__all__ = [
    "draw_age",
    "draw_events",
    "draw_health",
    "draw_loss",
    "draw_norm",
    "draw_speed",
    "draw_time",
    "draw_utilization",
    "event_kinds",
    "short",
    "step_axis",
]


class _Mark(NamedTuple):
    label: str
    color: str
    marker: str


# What the lane below the loss shows, from the top; other events are in the table only.
_MARKS = {
    "skip": _Mark("skipped update", "amber", "|"),
    "spike": _Mark("loss spike", "orange", "^"),
    "rollback": _Mark("rollback", "red", "X"),
    "promotion": _Mark("promoted", "violet", ">"),
    "demotion": _Mark("demoted", "violet", "<"),
    "alarm": _Mark("alarm", "orange", "o"),
    "bad_checkpoint": _Mark("bad checkpoint", "red", "s"),
    "resume": _Mark("resumed", "green", "D"),
    "early_stop": _Mark("early stop", "ink", "8"),
    "stop": _Mark("stopped", "ink", "8"),
}
_PHASE_COLORS = ("blue", "amber", "violet", "green")


def draw_loss(axes: Any, run: Run) -> None:
    """Each step, the running median, the validation; what is far above the axis is counted."""
    _curve(axes, run.column("loss"), "blue")
    validation = thin(run.validation)
    if len(validation.steps):
        axes.plot(
            *validation,
            color=COLORS["orange"],
            marker="o",
            markersize=3.5,
            markeredgecolor=COLORS["panel"],
            markeredgewidth=0.6,
            label="validation",
        )
    axes.set_ylabel("loss (nats per token)")
    _keep_spikes_from_flattening(axes, run)
    _shade(axes, run.phases, named=True)
    for event in run.events:
        if event["event"] == "rollback":
            axes.axvline(event["step"], color=COLORS["red"], linewidth=0.8, linestyle=":")
    _legend(axes)


def draw_norm(axes: Any, run: Run) -> None:
    """Norm of the gradients, on a logarithmic axis."""
    _curve(axes, run.column("grad_norm"), "green")
    _logarithmic(axes)
    axes.set_ylabel("gradient norm")
    _shade(axes, run.phases, named=False)


def draw_speed(axes: Any, run: Run) -> None:
    """Tokens per second."""
    _curve(axes, run.column("tokens_per_second"), "blue")
    axes.set(ylabel="tokens per second", ylim=(0, None))
    axes.yaxis.set_major_formatter(short)
    _legend(axes)
    _shade(axes, run.phases, named=False)


def draw_time(axes: Any, run: Run) -> None:
    """Time of a step and of waiting for its data, on a logarithmic axis."""
    for name, label, color in (
        ("seconds", "whole step", "blue"),
        ("data_seconds", "waiting for data", "amber"),
    ):
        steps, values = smooth(run.column(name))
        if (values > 0).any():
            milliseconds = np.where(values > 0, 1e3 * values, np.nan)
            axes.plot(steps, milliseconds, color=COLORS[color], label=label)
    _logarithmic(axes)
    axes.set_ylabel("time (ms)")
    _legend(axes)
    _shade(axes, run.phases, named=False)


def draw_utilization(axes: Any, run: Run) -> None:
    """Model FLOPs utilization."""
    steps, values = run.column("mfu")
    _curve(axes, Series(steps, 100 * values), "green")
    axes.set(ylabel="MFU (%)", ylim=(0, None))
    _shade(axes, run.phases, named=False)


def draw_health(axes: Any, run: Run) -> None:
    """Saturated and underflowed elements of all operands together."""
    for name, color in (("underflow", "blue"), ("saturated", "orange")):
        steps, values = run.column(name)
        percent = Series(steps, 100 * values)
        axes.plot(*thin(percent), color=COLORS[color], linewidth=0.6, alpha=0.3)
        axes.plot(*smooth(percent), color=COLORS[color], label=name)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set(ylabel="FP8 elements lost (%)", ylim=(0, None))
    axes.yaxis.set_major_formatter(_plain)
    _legend(axes)
    _shade(axes, run.phases, named=False)


def draw_age(axes: Any, run: Run) -> None:
    """Age of the scale that has not moved for longest."""
    _curve(axes, run.column("scale_age"), "green")
    axes.set(ylabel="oldest scale (steps)", ylim=(0, None))
    _shade(axes, run.phases, named=False)


def draw_events(axes: Any, run: Run, kinds: list[str]) -> None:
    """A row for each kind of event, a mark for each; many at one place are one mark."""
    last = max(run.last_step, 1)
    for row, kind in enumerate(kinds):
        steps = np.array([e["step"] for e in run.events if e["event"] == kind])
        _, first = np.unique(steps * 1000 // last, return_index=True)
        mark = _MARKS[kind]
        axes.plot(
            steps[first],
            np.full(len(first), row),
            linestyle="",
            marker=mark.marker,
            markersize=5,
            color=COLORS[mark.color],
            clip_on=False,
        )
    axes.set_yticks(range(len(kinds)), [_MARKS[kind].label for kind in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left"]].set_visible(False)


def event_kinds(run: Run) -> list[str]:
    """Kinds of events of the run that `draw_events` has a mark for, from the top."""
    found = {event["event"] for event in run.events}
    return [kind for kind in _MARKS if kind in found]


def _curve(axes: Any, series: Series, color: str) -> None:
    """Each step behind, its running median in front."""
    if not len(series.steps):
        return
    axes.plot(*thin(series), color=COLORS["faint"], linewidth=0.7, label="each step")
    label = f"median of {window_of(len(series.steps)):,} steps"
    axes.plot(*smooth(series), color=COLORS[color], label=label)


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis that has a number on it even if it is less than a decade long."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter("")


def _legend(axes: Any) -> None:
    """Above the axes, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, borderaxespad=0.4
        )


def _keep_spikes_from_flattening(axes: Any, run: Run) -> None:
    """The axis ends where 99 % of the losses and every median do; the rest is counted."""
    losses = run.column("loss").values
    drawn = np.r_[losses, run.validation.values]
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return
    typical = smooth(run.column("loss")).values
    top = np.nanmax(np.r_[np.quantile(drawn, 0.99), typical, run.validation.values])
    low = drawn.min()
    pad = 0.06 * max(top - low, 1e-3)
    axes.set_ylim(low - pad, top + 3 * pad)
    above = drawn[drawn > top + 3 * pad]
    if len(above):
        text = f"{len(above)} above the axis, up to {above.max():.4g}"
        axes.set_title(text, loc="right", color=COLORS["red"], fontsize=8.5, fontweight="normal")


def _shade(axes: Any, phases: list[Span], *, named: bool) -> None:
    """A tint for each recipe, if there are several, and its name where there is room."""
    recipes = list(dict.fromkeys(phase.recipe for phase in phases))
    if len(recipes) == 1:
        return
    whole = phases[-1].last - phases[0].first + 1
    quantized = [recipe for recipe in recipes if recipe != "none"]
    for recipe, first, last in phases:
        tint = "muted"
        if recipe in quantized:
            tint = _PHASE_COLORS[quantized.index(recipe) % len(_PHASE_COLORS)]
        axes.axvspan(first - 0.5, last + 0.5, color=COLORS[tint], alpha=0.09, linewidth=0, zorder=0)
        if named and (last - first + 1) > 0.013 * len(recipe) * whole:
            axes.text(
                (first + last) / 2,
                0.985,
                recipe,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                color=COLORS["muted"],
                fontweight="bold",
            )


def step_axis(axes: Any, run: Run, *, labelled: bool = True) -> None:
    """From 0 to the last step, as in all figures of a run."""
    axes.set_xlim(0, max(run.last_step, 1))
    axes.xaxis.set_major_formatter(short)
    if labelled:
        axes.set_xlabel("step")


def _plain(value: float, _: int | None = None) -> str:
    """0.001, 1, 50,000: no power of ten that needs Matplotlib's math."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short(value: float, _: int | None = None) -> str:
    """950, 1.5k, 20k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
