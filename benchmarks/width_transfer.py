"""Whether the best learning rate stays where it is when a model gets wider.

    python -m benchmarks.width_transfer --source shakespeare.txt
    python -m benchmarks.width_transfer --source shakespeare.txt --config shakespeare_char \
        --learning-rates 0.00025 0.0005 0.001 0.002 0.004 0.008 --out runs/width_standard

Trains one run for each width and learning rate and prints the validation losses. The heads and the
MLP grow with the model (32 numbers a head, 11/4 of the width); options that are not its own go to
all runs. By default the unit-scaled model in static FP8, whose rule for widths is that of
arXiv:2502.05967: the given learning rate is that of ``optim.base_width``.

Finished runs are kept: a study that was cut off goes on where it stopped. Writes
``width_transfer.json`` with losses, machine, versions and date.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, write_json
from benchmarks.studies import is_finished, open_study, train
from benchmarks.timing import format_table
from lowprec_jax.errors import TrainingFailedError

WIDTHS = (64, 128, 256)
LEARNING_RATES = (0.0075, 0.015, 0.03, 0.06, 0.12, 0.24)
_HEAD = 32


def main(argv: Sequence[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(argv)
    overrides = ["--steps", str(options.steps), *rest]
    try:
        open_study(options.out, options.config, options.source, overrides)
    except ValueError as error:
        print(f"width_transfer: error: {error}", file=sys.stderr)
        return 2
    losses = {
        width: {
            rate: _loss(
                options.out / f"{width}-{rate:g}",
                options,
                [*_sizes(width), "--optim.learning_rate", str(rate), *overrides],
            )
            for rate in options.learning_rates
        }
        for width in options.widths
    }
    print(format_table([_row(width, by_rate) for width, by_rate in losses.items()]))
    record = {"config": options.config, "overrides": overrides, "losses": losses}
    write_json(options.out / "width_transfer.json", {"machine": describe_machine(), **record})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.width_transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, help="text to train on")
    parser.add_argument("--config", default="shakespeare_char_unit_scaled")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="multiples of 32")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=LEARNING_RATES)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/width_transfer"))
    return parser


def _loss(path: Path, options: argparse.Namespace, overrides: Sequence[str]) -> float:
    """Validation loss of a run in nats, NaN if its guard stopped it; trains it where needed."""
    if not is_finished(path):
        try:
            train(path, options.config, options.source, overrides)
        except subprocess.CalledProcessError as failed:
            if failed.returncode != TrainingFailedError.exit_code:
                raise
            return math.nan
    return json.loads((path / "summary.json").read_text(encoding="utf-8"))["validation_loss"]


def _sizes(width: int) -> list[str]:
    sizes = {"width": width, "num_heads": width // _HEAD, "mlp_width": width * 11 // 4}
    return [word for key, size in sizes.items() for word in (f"--model.{key}", str(size))]


def _row(width: int, losses: dict[float, float]) -> dict[str, Any]:
    """Losses by learning rate, and the rate of the lowest, if any run came to its end."""
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    best = f"{min(finished, key=finished.__getitem__):g}" if finished else "none"
    return {"width": width, **{f"{rate:g}": loss for rate, loss in losses.items()}, "best": best}


if __name__ == "__main__":
    sys.exit(main())
