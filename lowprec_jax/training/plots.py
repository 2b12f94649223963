"""Curves of a run as PNG files."""

from pathlib import Path
from typing import Any

Record = dict[str, Any]


def plot_loss(records: list[Record], path: Path, title: str) -> None:
    """Draws training loss (with its running mean) and validation loss over steps."""
    from matplotlib.figure import Figure

    steps, losses = _series(records, "loss")
    validation = _series(records, "validation_loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="training, each step")
    axes.plot(steps, _running_mean(losses), color="#1f4e9c", label="training, running mean")
    axes.plot(*validation, color="#c8501e", marker="o", markersize=4, label="validation")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_health(records: list[Record], path: Path, title: str) -> None:
    """Draws saturated and underflow fractions and the age of the oldest scale over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    fractions, ages = figure.subplots(2, 1, sharex=True)
    for name, color in (("saturated", "#c8501e"), ("underflow", "#1f4e9c")):
        steps, values = _series(records, name)
        fractions.plot(steps, [100 * v for v in values], color=color, label=name)
    fractions.set(title=title, ylabel="elements (%)")
    fractions.set_yscale("symlog", linthresh=1e-3)
    fractions.legend()
    ages.plot(*_series(records, "scale_age"), color="#3d7a3d")
    ages.set(xlabel="step", ylabel="oldest scale (steps)")
    for axes in (fractions, ages):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _series(records: list[Record], name: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: list[float], decay: float = 0.95) -> list[float]:
    """Exponential running mean without the bias of its start."""
    total = weight = 0.0
    means = []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(total / weight)
    return means
