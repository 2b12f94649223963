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
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RAISED_THRESHOLDS, describe_machine, write_json
from benchmarks.timing import format_table

WIDTHS = (64, 128, 256)
LEARNING_RATES = (0.0075, 0.015, 0.03, 0.06, 0.12, 0.24)
_HEAD = 32
_STOPPED = 5  # exit code of a run that its guard stopped


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = _parser().parse_known_args(argv)
    losses = {
        width: {rate: _loss(width, rate, options, overrides) for rate in options.learning_rates}
        for width in options.widths
    }
    rows = [_row(width, by_rate) for width, by_rate in losses.items()]
    print(format_table(rows))
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


def _loss(width: int, rate: float, options: argparse.Namespace, overrides: list[str]) -> float:
    """Validation loss of one run in nats, NaN if the guard stopped it.

    Trains it from its start if it is not finished.
    """
    path = options.out / f"{width}-{rate:g}"
    summary = path / "summary.json"
    if not summary.exists():
        shutil.rmtree(path, ignore_errors=True)
        print(f"width {width}, learning rate {rate:g}:", flush=True)
        command = _command(width, rate, path, options) + overrides
        run = subprocess.run(command, env={**os.environ, **RAISED_THRESHOLDS}, check=False)
        if run.returncode == _STOPPED:
            return math.nan
        run.check_returncode()
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
    loss = json.loads(summary.read_text(encoding="utf-8"))["validation_loss"]
    return math.nan if loss is None else loss


def _command(width: int, rate: float, path: Path, options: argparse.Namespace) -> list[str]:
    settings: dict[str, Any] = {
        "config": options.config,
        "name": path.name,
        "run_dir": path,
        "data.source": options.source,
        "steps": options.steps,
        "model.width": width,
        "model.num_heads": width // _HEAD,
        "model.mlp_width": width * 11 // 4,
        "optim.learning_rate": rate,
        "eval_every": 0,
        "checkpoint_every": 0,
        "log_every": 100,
        "sample_tokens": 0,
        "plots": False,
        "progress": False,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "lowprec_jax", "train", *words]


def _row(width: int, losses: dict[float, float]) -> dict[str, Any]:
    """Losses by learning rate, and the best one."""
    best = min(losses, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))
    by_rate = {f"{rate:g}": loss for rate, loss in losses.items()}
    return {"width": width, **by_rate, "best": f"{best:g}"}


if __name__ == "__main__":
    sys.exit(main())
