"""The report of a run: ``report.html``, whole in one file, and its curves as PNG files.

It is made from the files of the run directory alone, at the end of a run and whenever asked for,
also while the run trains. Imports no JAX. Public name: `write_report`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowprec_jax.errors import UserError
from lowprec_jax.training.report_data import Run, read_run
from lowprec_jax.training.report_figures import (
    health_figure,
    loss_figure,
    overview_figure,
    speed_figure,
)
from lowprec_jax.training.report_heatmap import operand_figure, sqnr_figure
from lowprec_jax.training.report_page import build_page
from lowprec_jax.training.report_tables import figures_of, state_of
from lowprec_jax.training.report_theme import png, style, svg

__all__ = ["write_report"]


def write_report(path: str | Path) -> list[Path]:
    """Writes the report of a run into its directory.

    ``report.html``    everything, to be opened anywhere
    ``report.png``     an overview: key figures, loss, speed, FP8 health
    ``loss.png``       training and validation loss, gradient norm, events
    ``health.png``     saturated and underflowed elements; with FP8
    ``operands.png``   heat maps of every operand; if the log reports them

    Args:
      path: directory of a run, finished or not.

    Returns:
      The files that were written, the page first. Each is replaced whole or not at all.

    Raises:
      UserError: there is no such run, it has no metrics, its directory cannot be written, or
        Matplotlib is not installed.
    """
    run = read_run(path)
    with style():
        figures = {
            "loss": loss_figure(run),
            "speed": speed_figure(run),
            "health": health_figure(run),
            "operands": operand_figure(run),
            "sqnr": sqnr_figure(run),
        }
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        vectors = {name: svg(figure, name, _LABELS[name]) for name, figure in drawn.items()}
        pictures = {n: drawn[n] for n in ("loss", "health", "operands") if n in drawn}
        files: dict[str, bytes] = {
            "report.html": build_page(run, vectors).encode(),
            "report.png": png(_overview(run)),
            **{f"{name}.png": png(figure) for name, figure in pictures.items()},
        }
    return _write(run.path, files)


_LABELS = {
    "loss": "Loss over steps",
    "speed": "Speed over steps",
    "health": "Lost FP8 elements over steps",
    "operands": "Health of every FP8 operand over steps",
    "sqnr": "Signal to quantization noise of the gradients over steps",
}


def _overview(run: Run) -> Any:
    found = [f"{figure.name} {figure.value}" for figure in figures_of(run)]
    half = -(-len(found) // 2) if len(found) > 6 else len(found)
    lines = ["   ·   ".join(part) for part in (found[:half], found[half:]) if part]
    return overview_figure(run, f"{run.name}: {state_of(run)[1]}", lines)


def _write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    written = []
    for name, content in files.items():
        temporary = folder / f".{name}.tmp"
        try:
            temporary.write_bytes(content)
            written.append(temporary.replace(folder / name))
        except OSError as error:
            raise UserError(
                f"Cannot write {name} into {folder}: {error}. Free some space, or give a copy of "
                "the run that may be written."
            ) from None
    return written
