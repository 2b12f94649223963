"""The training step against the number of devices and the size of the model.

    python -m benchmarks.scaling [--devices 1 2 4] [--widths 64 128 256]

Every size is a process of its own that runs ``benchmarks.train_step``: quickstart in f32 and FP8,
at each width on one device, and with the batch split over each number of devices. "tokens/s" is of
all devices together. Emulated devices share the cores of one machine: what they show is what the
split costs, not what it gains.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import use_allocator
from benchmarks.timing import report, section_parser

CASES = ("quickstart_fp32", "quickstart")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    code = use_allocator(options.allocator, "benchmarks.scaling", words)
    if code is not None:
        return code
    rows, seconds = [], {}
    for group, overrides in _sizes(options):
        record = _run([*overrides, *("--rounds", str(options.rounds))])
        if record is None:
            return 1
        config = next(iter(record["configs"].values()))
        tokens = config["batch_size"] * config["model"]["context"]
        for row in record["rows"]:
            kept = {key: row[key] for key in ("case", "ms", "x first", "temp MiB")}
            rows.append({"group": group, **kept, "tokens/s": tokens / row["ms"] * 1e3})
        seconds[group] = record["seconds"]["given"]
    report(options.json, rows, seconds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = section_parser("scaling", __doc__)
    parser.add_argument("--devices", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    return parser


def _sizes(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Name and overrides of every size."""
    common = ["--model.num_layers", str(options.layers), "--batch_size", str(options.batch)]
    for width in options.widths:
        yield f"width {width}", [*common, "--model.width", str(width)]
    for devices in options.devices:
        yield f"{devices} devices", [*common, "--mesh.data", str(devices)]


def _run(words: Sequence[str]) -> dict[str, Any] | None:
    """The record of the benchmark of the training step; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, "-m", "benchmarks.train_step", *CASES, *words]
        if subprocess.run([*command, "--json", str(path)]).returncode:
            return None
        return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
