"""What a sweep found: a table, ``sweep.json`` and ``sweep.png``. Imports no JAX.

Public names: `Estimate`, `Group`, `estimate`, `table`, `write_results`.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowprec_jax.errors import UserError
from lowprec_jax.training.report_data import Array, Run, Series
from lowprec_jax.training.report_series import smooth

__all__ = ["Estimate", "Group", "estimate", "table", "write_results"]

_COLORS = ("blue", "orange", "green", "violet", "amber", "red")


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error; NaN if there is one seed."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.4f}"
        return f"{self.mean:.4f}{error}"


class Group(NamedTuple):
    """The runs of one config, in the order of the seeds."""

    label: str
    seeds: list[int]
    runs: list[Run]

    def values(self, name: str) -> list[float]:
        """A number out of the summary of each run; NaN where it holds null."""
        found = (run.summary[name] for run in self.runs)
        return [math.nan if value is None else value for value in found]

    @property
    def losses(self) -> list[float]:
        """The last validation loss of each run."""
        return self.values("validation_loss")


def estimate(values: Sequence[float]) -> Estimate:
    """The mean, and the sample standard deviation over the root of the count."""
    count = len(values)
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(np.mean(values)), error)


def _difference(group: Group, baseline: Group) -> Estimate:
    """Of the losses, paired by seed."""
    pairs = zip(group.losses, baseline.losses, strict=True)
    return estimate([mine - theirs for mine, theirs in pairs])


def table(groups: list[Group]) -> str:
    """Every run, the mean of every group, and how much the others differ from the first."""
    width = max(len("config"), *(len(group.label) for group in groups))
    lines = [f"{'config':{width}}  {'seed':>6}  {'val loss':>8}  {'best':>8}  {'tokens/s':>10}"]
    names = ("validation_loss", "best_validation_loss", "tokens_per_second")
    for group in groups:
        columns = zip(*(group.values(name) for name in names), strict=True)
        for seed, (loss, best, speed) in zip(group.seeds, columns, strict=True):
            lines.append(
                f"{group.label:{width}}  {seed:>6}  {loss:8.4f}  {best:8.4f}  {speed:10,.0f}"
            )
        lines.append(f"{group.label:{width}}  {'mean':>6}  {estimate(group.losses)!s:>8}")
    for group in groups[1:]:
        what = f"{group.label} - {groups[0].label}, paired by seed"
        lines.append(f"{what}: {_difference(group, groups[0])}")
    return "\n".join(lines)


def write_results(directory: Path, groups: list[Group], *, plots: bool) -> None:
    """Writes ``sweep.json`` and, if asked for and Matplotlib is there, ``sweep.png``."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain([_result(group, groups[0]) for group in groups]), indent=2)
    (directory / "sweep.json").write_text(f"{text}\n", encoding="utf-8")
    if plots:
        try:
            (directory / "sweep.png").write_bytes(_figure(groups))
        except UserError as error:  # no Matplotlib
            print(error)
    print(f"The results are in {directory}/.")


def _result(group: Group, baseline: Group) -> dict[str, Any]:
    names = ("steps", "validation_loss", "best_validation_loss", "tokens_per_second")
    return {
        "config": group.label,
        "validation_loss": estimate(group.losses)._asdict(),
        "best_validation_loss": estimate(group.values("best_validation_loss"))._asdict(),
        "difference_to": None if group is baseline else baseline.label,
        "difference": None if group is baseline else _difference(group, baseline)._asdict(),
        "runs": [
            {"seed": seed, "run_dir": str(run.path), **{name: run.summary[name] for name in names}}
            for seed, run in zip(group.seeds, group.runs, strict=True)
        ],
    }


def _plain(value: Any) -> Any:
    """With null for a number that is not finite, as JSON has none."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(groups: list[Group]) -> bytes:
    """Training and validation loss of each config: the mean over seeds, and its error as a band."""
    from lowprec_jax.training.report_theme import COLORS, figure, png, style

    with style():
        drawn = figure(4.2)
        axes = drawn.subplots()
        for index, group in enumerate(groups):
            color = COLORS[_COLORS[index % len(_COLORS)]]
            steps, mean, error = _mean([smooth(run.column("loss")) for run in group.runs])
            axes.plot(steps, mean, color=color, label=f"{group.label}: training, running median")
            axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.25, lw=0)
            steps, mean, error = _mean([run.validation for run in group.runs])
            label = f"{group.label}: validation"
            axes.errorbar(
                steps, mean, error, fmt="o--", ms=3.5, capsize=3, color=color, label=label
            )
        seeds = ", ".join(map(str, groups[0].seeds))
        axes.set(
            title=f"Mean and standard error of seeds {seeds}",
            xlabel="step",
            ylabel="loss (nats per token)",
        )
        axes.legend()
        return png(drawn)


def _mean(curves: list[Series]) -> tuple[Array, Array, Array]:
    """Steps that all curves have, and the mean and its standard error (0 for one curve) there."""
    steps = functools.reduce(np.intersect1d, [curve.steps for curve in curves])
    values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
    count = len(curves)
    error = values.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else 0 * values[0]
    return steps, values.mean(axis=0), error
