"""``lowprec_jax report``: what it prints, and what it refuses."""

import json
import subprocess
import sys

import pytest

from lowprec_jax.cli.main import main


@pytest.fixture
def run_directory(tmp_path):
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    records = [{"step": i, "loss": 4.0 - i} for i in (1, 2)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return path


def test_report__a_run__is_written_without_jax(run_directory):
    code = (
        f"import sys; from lowprec_jax.cli.main import main; "
        f"code = main(['report', {str(run_directory)!r}]); "
        "sys.exit(code if 'jax' not in sys.modules else 'loaded jax')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    page = run_directory / "report.html"
    assert done.stdout == f"Wrote {page}, and beside it report.png, loss.png.\n"
    assert page.is_file()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "takes one run directory, given: nothing"),
        (["a", "b"], "takes one run directory, given: a b"),
        (["--what", "a"], "given: --what a"),
        (["nothing"], "No run directory 'nothing'"),
        (["mine"], "Did you mean 'runs/mine'?"),
        (["runs"], "runs holds no metrics"),
    ],
)
def test_report__bad_input__is_one_paragraph_and_code_2(
    run_directory, monkeypatch, words, part, capsys
):
    monkeypatch.chdir(run_directory.parents[1])
    assert main(["report", *words]) == 2
    shown = capsys.readouterr()
    assert part in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_report__help__says_what_it_takes(capsys):
    assert main(["report", "--help"]) == 0
    assert "usage: lowprec_jax report RUN" in capsys.readouterr().out
