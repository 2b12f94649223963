"""benchmarks/__main__.py: gates on made-up records, and smoke runs of whole processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import GATES, QUICK, SECTIONS, Gate, judge, main, summarize

REPOSITORY = Path(__file__).parents[2]
TIME = Gate("layer", "8x8x8", "ours", "theirs", 0.8)
MEMORY = Gate("memory", "stack", "ours", None, 430.0, "temp MiB")


def records(**seconds: list[float]) -> dict:
    return {"layer": [{"rows": [], "seconds": {"8x8x8": seconds}}]}


@pytest.mark.parametrize(
    ("ours", "passed", "figure"),
    [([1, 1, 9], True, 0.5), ([1.6, 1.6, 1.6], True, 0.8), ([1.7, 1.7, 0.1], False, 0.85)],
    ids=["below", "at the limit", "above"],
)
def test_judge__times__median_of_the_rounds_against_the_limit(ours, passed, figure):
    (verdict,) = judge([TIME], records(ours=ours, theirs=[2, 2, 2]))

    assert (verdict.passed, verdict.figure) == (passed, figure)
    assert str(verdict).startswith("PASS" if passed else "MISS")
    assert f"{figure:.4g} (at most 0.8)" in str(verdict)


def test_judge__missing_row__is_a_miss():
    (verdict,) = judge([TIME], records(ours=[1.0]))

    assert not verdict.passed
    assert str(verdict) == "MISS  layer, 8x8x8: ours / theirs: no figure (at most 0.8)"


@pytest.mark.parametrize(("found", "passed"), [(430.0, True), (430.1, False), (None, False)])
def test_judge__memory__the_column_of_the_row(found, passed):
    row = {"group": "stack", "case": "ours", "temp MiB": found}
    other = {"group": "another", "case": "ours", "temp MiB": 1.0}

    (verdict,) = judge([MEMORY], {"memory": [{"rows": [other, row], "seconds": {}}]})

    assert (verdict.figure, verdict.passed) == (found, passed)


def test_judge__section_that_did_not_run__has_no_verdict():
    assert judge([TIME, MEMORY], {}) == []


def test_judge__second_process_of_a_section__is_read_too():
    found = records(ours=[1.0], theirs=[2.0])
    found["layer"].insert(0, {"rows": [], "seconds": {"other": {}}})

    assert judge([TIME], found)[0].figure == 0.5


def test_gates__all__name_a_section_with_runs():
    assert {gate.section for gate in GATES} <= set(SECTIONS) == set(QUICK)


def test_summarize__group__ratios_to_its_first_row():
    rows = [
        {"group": "a", "case": "f32", "ms": 4.0},
        {"group": "a", "case": "fp8", "ms": 3.0},
        {"group": "b", "case": "f32", "ms": 10.0},
    ]

    found = summarize({"layer": [{"rows": rows}]})

    assert [row["x first"] for row in found] == [1, 0.75, 1]


def test_main__unknown_section__exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["layers"])

    assert stopped.value.code == 2
    assert "'layers' is no section" in capsys.readouterr().err


def run(*words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)


def test_main__quick_cast__writes_summary_and_plot(tmp_path):
    done = run("cast", "--quick", "--folder", str(tmp_path))

    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["gates"] == summary["failed"] == []
    assert (
        "MALLOC_MMAP_THRESHOLD_=1073741824"
        in json.loads((tmp_path / "cast_0.json").read_text())["machine"]["allocator"]
    )
    assert {"copy", "delayed e4m3"} <= {row["case"] for row in summary["rows"]}
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_main__section_fails__exits_with_1(tmp_path, monkeypatch):
    monkeypatch.setitem(QUICK, "cast", ("--no-such-option",))

    assert main(["cast", "--quick", "--folder", str(tmp_path)]) == 1

    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == ["cast"]


@pytest.mark.nightly
@pytest.mark.parametrize("section", list(QUICK))
def test_main__quick__every_section_runs(section, tmp_path):
    done = run(section, "--quick", "--folder", str(tmp_path))

    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {section}
