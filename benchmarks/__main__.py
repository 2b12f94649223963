"""All benchmarks, with a summary, a plot and gates.

    python -m benchmarks                     # every section
    python -m benchmarks layer cast          # some of them
    python -m benchmarks --quick             # does it run? tiny sizes; judges nothing

Sections: layer, train_step, cast, compile, memory, scaling. Each is a program of its own,
``python -m benchmarks.SECTION``, and runs here in processes of its own. A gate is a figure with a
limit; it is printed with PASS or MISS. Written to ``--folder``: ``summary.json``, ``summary.png``
where matplotlib is installed, and the record of every process.

Exit code 1: a gate of a section that ran is missed, or a section failed.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_machine, write_json
from benchmarks.peers.linen import PEERS
from benchmarks.timing import format_table, median_ratio

OURS = "fp8_delayed"
STEP_CASES = ("quickstart_fp32", "quickstart", "quickstart_bf16")
WIDE = (
    "--model.width 512 --model.num_heads 8 --model.context 256 --batch_size 8 --rounds 5 --inner 1"
)
TINY = (
    "--model.num_layers 1 --model.num_heads 2 --model.width 32 --model.context 16 --batch_size 4"
    " --rounds 1 --inner 1"
)


def _step(group: str, words: str = "", peers: Sequence[str] = tuple(PEERS)) -> str:
    return shlex.join([*STEP_CASES, "--group", group, "--peers", *peers]) + f" {words}"


# Section -> the words of each of its processes.
SECTIONS: dict[str, tuple[str, ...]] = {
    "layer": ("",),
    "train_step": (
        _step("quickstart"),
        _step("width 512", WIDE),
        _step("width 512, remat", f"{WIDE} --model.remat full", peers=()),
    ),
    "cast": ("",),
    "compile": ("",),
    "memory": ("",),
    "scaling": ("",),
}
QUICK: dict[str, tuple[str, ...]] = {
    "layer": ("--shapes 32x64x48 --rounds 2",),
    "train_step": (_step("quickstart", TINY, peers=("flax direct",)),),
    "cast": ("--elements 4096 --rounds 2",),
    "compile": (f"--depths 2 --unrolled --width 32 --rounds 1 --cases {OURS}",),
    "memory": (f"--layers 2 --width 32 --tokens 64 --cases bf16 {OURS}",),
    "scaling": ("--devices 2 --widths --layers 1 --batch 4 --rounds 1",),
}


class Gate(NamedTuple):
    """A figure of a section, which may not be above a limit.

    Attributes:
      section: the section.
      group: its table.
      case: the row.
      against: another row of the group; the figure is the ratio to it, the median over the rounds.
        None: the figure is the row's own.
      limit: largest right value.
      column: a column of the rows, for a figure that is no time.
    """

    section: str
    group: str
    case: str
    against: str | None
    limit: float
    column: str | None = None


def _layer_gates() -> list[Gate]:
    limits = {
        "1024x1024x4096": {"f32": 0.85, "flax direct": 1 / 1.5},
        "4096x512x2048": {"f32": 1.0, "flax direct": 1 / 1.25},
    }
    others = {"qwix fp8": 1 / 1.3, "aqt fp8": 1 / 1.3}
    return [
        Gate("layer", shape, OURS, against, limit)
        for shape, own in limits.items()
        for against, limit in {**own, **others}.items()
    ]


def _step_gates() -> list[Gate]:
    f32, fp8, bf16 = STEP_CASES
    limits = {"quickstart": 0.95, "width 512": 0.85}
    gates = [Gate("train_step", group, fp8, f32, limit) for group, limit in limits.items()]
    gates.append(Gate("train_step", "width 512, remat", fp8, f32, 1.0))
    return gates + [
        Gate("train_step", group, fp8, other, 1.0) for group in limits for other in (bf16, *PEERS)
    ]


GATES = (
    *_layer_gates(),
    *_step_gates(),
    Gate("cast", "f32 tensor", "delayed e4m3", "copy", 2.0),
    Gate("compile", "48 layers, scanned", f"compile {OURS}", "compile f32", 1.3),
    Gate("compile", "12 layers, unrolled", f"compile {OURS}", "compile f32", 1.6),
    Gate("compile", "48 layers, scanned", f"trace {OURS}", "trace f32", 2.0),
    Gate("compile", "12 layers, unrolled", f"trace {OURS}", "trace f32", 2.0),
    Gate("memory", "8 layers, width 512, 4096 tokens", OURS, None, 430.0, "temp MiB"),
    # The reference workload: plain bf16 takes 502 MiB where Flax's op takes 430.
    Gate("memory", "8 layers, width 512, 4096 tokens", "bf16", None, 503.0, "temp MiB"),
)


class Verdict(NamedTuple):
    """A gate with its figure, None where there is none."""

    gate: Gate
    figure: float | None

    @property
    def passed(self) -> bool:
        return self.figure is not None and self.figure <= self.gate.limit

    def __str__(self) -> str:
        gate = self.gate
        what = f"{gate.case} / {gate.against}" if gate.against else f"{gate.case}, {gate.column}"
        found = "no figure" if self.figure is None else f"{self.figure:.4g}"
        word = "PASS" if self.passed else "MISS"
        return f"{word}  {gate.section}, {gate.group}: {what}: {found} (at most {gate.limit:.4g})"


def judge(gates: Sequence[Gate], records: Mapping[str, Sequence[Mapping]]) -> list[Verdict]:
    """The verdicts on the gates of the sections that ran.

    Args:
      gates: the gates.
      records: the records of each section, as `benchmarks.timing.report` writes them.
    """
    return [
        Verdict(gate, _figure(gate, records[gate.section]))
        for gate in gates
        if gate.section in records
    ]


def _figure(gate: Gate, records: Sequence[Mapping]) -> float | None:
    """The figure of a gate; None if a row or column that it needs is missing."""
    for record in records:
        if gate.against is not None:
            times = record["seconds"].get(gate.group, {})
            if gate.case in times and gate.against in times:
                return median_ratio(times[gate.case], times[gate.against])
            continue
        for row in record["rows"]:
            if (row["group"], row["case"]) == (gate.group, gate.case):
                return row.get(gate.column)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    folder = Path(options.folder)
    records: dict[str, list[dict[str, Any]]] = {}
    failed = []
    for section in options.sections or SECTIONS:
        runs = (QUICK if options.quick else SECTIONS)[section]
        found = [_run(section, run, folder / f"{section}_{i}.json") for i, run in enumerate(runs)]
        records[section] = [record for record in found if record is not None]
        failed += [section] * (None in found)
    verdicts = [] if options.no_gates or options.quick else judge(GATES, records)
    rows = summarize(records)
    print("\n" + format_table(rows) if rows else "nothing was measured")
    print(*verdicts, *(f"FAILED  {section}" for section in failed), sep="\n", flush=True)
    write_json(folder / "summary.json", _summary(rows, verdicts, failed, options.quick))
    _plot(rows, folder / "summary.png")
    return int(bool(failed) or not all(verdict.passed for verdict in verdicts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sections", nargs="*", type=_section, metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke run")
    parser.add_argument("--no-gates", action="store_true", help="judge nothing")
    parser.add_argument("--folder", default="runs/benchmarks")
    return parser


def _section(name: str) -> str:
    if name not in SECTIONS:
        raise argparse.ArgumentTypeError(f"{name!r} is no section; use {', '.join(SECTIONS)}")
    return name


def _run(section: str, words: str, path: Path) -> dict[str, Any] | None:
    """The record of one process; None if it failed."""
    print(f"\n== {section} {words}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{section}", *shlex.split(words)]
    if subprocess.run([*command, "--json", str(path)]).returncode:
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def summarize(records: Mapping[str, Sequence[Mapping]]) -> list[dict[str, Any]]:
    """Every case as a ratio: of its times to the first of its group, of its memory likewise."""
    rows = []
    for section, found in records.items():
        for row in (row for record in found for row in record["rows"]):
            column = next((c for c in ("ms", "temp MiB", "compile s") if row.get(c)), None)
            if column is None:
                continue
            same = (r for record in found for r in record["rows"] if r["group"] == row["group"])
            rows.append(
                {
                    "section": section,
                    "group": row["group"],
                    "case": row["case"],
                    "figure": row[column],
                    "unit": column,
                    "x first": row[column] / next(same)[column],
                }
            )
    return rows


def _summary(rows, verdicts: Sequence[Verdict], failed, quick: bool) -> dict[str, Any]:
    gates = [{**v.gate._asdict(), "figure": v.figure, "passed": v.passed} for v in verdicts]
    return {
        "machine": describe_machine(),
        "quick": quick,
        "rows": rows,
        "gates": gates,
        "failed": failed,
    }


# How the names of our cases begin that are in FP8.
_OURS = ("fp8_", "delayed", "current", "quickstart")


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the ratios, a panel for each group; nothing without matplotlib."""
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["section"], row["group"]) for row in rows))
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(5.5 * columns, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, group in zip(panels, groups, strict=False):
        own = [row for row in rows if (row["section"], row["group"]) == group][::-1]
        names, ratios = [row["case"] for row in own], [row["x first"] for row in own]
        axes.barh(names, ratios, color=["C1" if n.startswith(_OURS) else "C0" for n in names])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(f"{group[0]}: {group[1]} ({own[0]['unit']}, x {names[-1]})", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in figure.axes[len(groups) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
