"""What low precision costs in quality: the same training runs in each, compared seed by seed.

    python -m benchmarks.precision_gap --source shakespeare.txt --seeds 5
    python -m benchmarks.precision_gap --source shakespeare.txt --seeds 3 --recipes mxfp8,nvfp4,int8

Trains ``configs/shakespeare_char`` (its header says where the text comes from), or another
``--config``, with the recipes, fp8_delayed and fp8_current unless others are named, and with bf16
and fp32. Runs of one seed start from the same weights and see the same batches, so that their
difference is the precision and rounding noise. Reported for every recipe: the loss over the whole
validation split, mean and standard error; the paired differences to BF16 and FP32 of that loss and
of the mean training loss of the last steps.

Every run is a process of its own. Finished runs in the output folder are not repeated: call it
again to go on, with more seeds to add some. A run takes about a minute on two idle cores.

Writes ``gap.json`` and ``gap.png`` into the output folder after every run. Exit code 0: each
recipe stays within the limits below; 1: one does not, or runs are missing; 2: bad input. Expect
differences of a few thousandths of a nat, of the size of their standard errors. ``--report-only``
trains nothing. Other options go to the training runs: ``--steps 500 --model.width 64``.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, write_json
from benchmarks.studies import is_finished, open_study, train

RECIPES = ("fp8_delayed", "fp8_current")
# What recipes are compared with: options of the training runs.
REFERENCES = {
    "bf16": ("--precision.recipe", "none", "--model.compute_dtype", "bfloat16"),
    "fp32": ("--precision.recipe", "none"),
}

# Limits in nats per token. The first is absolute: the whole validation split of tinyshakespeare
# after 2,000 steps. The others bound the mean paired differences to BF16 and to FP32.
MAX_VALIDATION_LOSS = 1.72
MAX_VALIDATION_GAP = 0.015
MAX_TRAINING_GAP = 0.010
# Recipes of four bits have gaps of their own; what is None is reported and not judged.
OTHER_GAPS = {
    "nvfp4": 0.05,
    "mxfp4": None,
    **dict.fromkeys(("nvfp4_nearest", "nvfp4_unrotated", "nvfp4_weight_rows")),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run says.

    Attributes:
      validation: loss over the whole validation split after the last step, nats per token.
      training: mean training loss of the last steps, nats per token.
      curve: training loss of every step.
    """

    validation: float
    training: float
    curve: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options, overrides = _parser().parse_known_args(words)
    out = Path(options.out)
    try:
        open_study(out, options.config, options.source, overrides)
    except ValueError as error:
        print(f"precision_gap: error: {error}", file=sys.stderr)
        return 2
    if not options.report_only:
        for seed in range(options.seeds):
            for variant in _variants(options):
                path = _run_path(out, variant, seed)
                if not is_finished(path):
                    own = REFERENCES.get(variant, ("--precision.recipe", variant))
                    words = [*own, "--seed", str(seed), *overrides]
                    train(path, options.config, options.source, words)
                    _report(out, options)
    report = _report(out, options)
    print(_table(report))
    verdict = report["verdict"]
    return 0 if verdict["within_limits"] and verdict["complete"] else 1


def _variants(options: argparse.Namespace) -> tuple[str, ...]:
    """Recipes and references; the order within a seed makes early results informative."""
    first, *others = options.recipes
    return (first, *REFERENCES, *others)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision_gap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="shakespeare_char", help="what is trained")
    parser.add_argument("--source", default="shakespeare.txt", help="the text to train on")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each recipe: seeds 0, 1, …")
    parser.add_argument(
        "--recipes",
        type=lambda text: tuple(text.split(",")),
        default=RECIPES,
        help="what is compared with bf16 and fp32, names joined by commas",
    )
    parser.add_argument("--out", default="runs/precision_gap", help="folder of runs and report")
    parser.add_argument(
        "--last-steps", type=int, default=200, help="steps that the mean training loss is over"
    )
    parser.add_argument("--report-only", action="store_true", help="report the finished runs")
    return parser


def _run_path(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant}-{seed}"


def _read(path: Path, last_steps: int) -> Result:
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    return Result(summary["validation_loss"], statistics.fmean(curve[-last_steps:]), curve)


def _report(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compares the finished runs and writes the report."""
    results = {
        variant: {
            seed: _read(_run_path(out, variant, seed), options.last_steps)
            for seed in range(options.seeds)
            if is_finished(_run_path(out, variant, seed))
        }
        for variant in _variants(options)
    }
    report = {
        "machine": describe_machine(),
        "study": json.loads((out / "study.json").read_text(encoding="utf-8")),
        "code": sorted(
            {json.loads(path.read_text())["sha256"] for path in out.glob("*/code.json")}
        ),
        "last_steps": options.last_steps,
        "runs": {
            variant: {
                str(seed): {"validation": result.validation, "training": result.training}
                for seed, result in by_seed.items()
            }
            for variant, by_seed in results.items()
        },
        "means": {
            variant: {
                "validation": _mean(r.validation for r in by_seed.values()),
                "training": _mean(r.training for r in by_seed.values()),
            }
            for variant, by_seed in results.items()
        },
        "gaps": {
            f"{recipe} - {reference}": _gap(results[recipe], results[reference])
            for recipe in options.recipes
            for reference in REFERENCES
        },
    }
    report["verdict"] = _verdict(report, options)
    write_json(out / "gap.json", report)
    _plot(results, report, out / "gap.png")
    return report


def _mean(values: Iterable[float]) -> dict[str, Any]:
    """Mean, standard error of the mean and number of values; None where there are too few."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values) if values else None,
        "standard_error": error,
        "n": len(values),
    }


def _gap(recipe: dict[int, Result], reference: dict[int, Result]) -> dict[str, Any]:
    """Paired differences over the seeds that both have."""
    seeds = [seed for seed in recipe if seed in reference]
    return {
        "validation": _mean(recipe[s].validation - reference[s].validation for s in seeds),
        "training": _mean(recipe[s].training - reference[s].training for s in seeds),
    }


def _verdict(report: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Every limit with its value; a NaN or a missing value is not within it."""
    checks = []
    for recipe in options.recipes:
        if recipe not in OTHER_GAPS:
            loss = report["means"][recipe]["validation"]
            checks.append((f"validation loss {recipe}", loss, MAX_VALIDATION_LOSS))
        for reference in REFERENCES:
            name = f"{recipe} - {reference}"
            gap, limit = report["gaps"][name], OTHER_GAPS.get(recipe, MAX_VALIDATION_GAP)
            if limit is not None:
                checks.append((f"validation gap {name}", gap["validation"], limit))
            if recipe not in OTHER_GAPS:
                checks.append((f"training gap {name}", gap["training"], MAX_TRAINING_GAP))
    rows = [
        {
            "what": what,
            "value": found["mean"],
            "limit": limit,
            "within": found["mean"] is not None and found["mean"] <= limit,
        }
        for what, found, limit in checks
    ]
    return {
        "complete": all(found["n"] == options.seeds for _, found, _ in checks),
        "within_limits": all(row["within"] for row in rows),
        "checks": rows,
    }


def _table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'nats per token, mean ± standard error':44s}{'validation':>22s}{'training':>22s}"]
    for name, row in {**report["means"], **report["gaps"]}.items():
        cells = "".join(f"{_cell(row[k], ' - ' in name):>22s}" for k in ("validation", "training"))
        lines.append(f"{name:44s}{cells}")
    verdict = report["verdict"]
    missed = [row for row in verdict["checks"] if not row["within"]]
    lines += [
        f"MISSED: {row['what']} is {_number(row['value'])}, limit {row['limit']}" for row in missed
    ]
    if not missed:
        lines.append(
            f"Within all limits: validation loss {MAX_VALIDATION_LOSS}, gaps {MAX_VALIDATION_GAP} "
            f"(validation) and {MAX_TRAINING_GAP} (training); four bits: see OTHER_GAPS."
        )
    if not verdict["complete"]:
        lines.append("Not all runs are finished; n is the number that are.")
    if len(report["code"]) > 1:
        lines.append(f"The runs are of {len(report['code'])} versions of the code.")
    return "\n".join(lines)


def _cell(found: dict[str, Any], signed: bool) -> str:
    if found["mean"] is None:
        return "n=0"
    mean = f"{found['mean']:{'+' if signed else ''}.4f}"
    return f"{mean} ± {_number(found['standard_error'])} n={found['n']}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _plot(results: dict[str, dict[int, Result]], report: dict[str, Any], path: Path) -> None:
    """Mean training curves, and the paired differences of the validation loss, a dot per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, gaps = figure.subplots(1, 2)
    for variant, by_seed in results.items():
        if by_seed:
            columns = zip(*(r.curve for r in by_seed.values()), strict=True)
            curves.plot(_smooth([statistics.fmean(c) for c in columns]), label=variant, lw=1)
    curves.set(xlabel="step", ylabel="training loss (nats per token)", title="mean over seeds")
    curves.set_yscale("log")
    curves.legend()
    for row, (name, gap) in enumerate(report["gaps"].items()):
        recipe, reference = (results[variant] for variant in name.split(" - "))
        points = [recipe[s].validation - reference[s].validation for s in recipe if s in reference]
        gaps.scatter(points, [row] * len(points), color="#b8c4d6")
        found = gap["validation"]
        if found["mean"] is not None:
            error = found["standard_error"] or 0.0
            gaps.errorbar(found["mean"], row, xerr=error, fmt="o", color="#1f4e9c", capsize=4)
    gaps.set_yticks(range(len(report["gaps"])), list(report["gaps"]))
    gaps.axvline(0, color="black", lw=0.8)
    gaps.axvline(MAX_VALIDATION_GAP, color="#c8501e", ls="--", label="limit")
    gaps.set(xlabel="difference of validation loss (nats per token)", title="paired by seed")
    gaps.legend()
    for axes in (curves, gaps):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], window: int = 50) -> list[float]:
    """Mean over the last `window` values at every position."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    sys.exit(main())
