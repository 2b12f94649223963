"""Sweeps: which runs are made, made again or only read, how they end, and the numbers.

Most runs are a stand-in for ``train`` that takes its words and writes the files that count; one
sweep trains.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lowprec_jax.cli import sweep
from lowprec_jax.cli.main import main
from lowprec_jax.errors import UserError

ROOT = Path(__file__).parents[2]
LOSSES = {("a", 0): 2.0, ("a", 1): 2.5, ("a", 2): 2.1, ("b", 0): 2.1, ("b", 1): 2.8, ("b", 2): 2.3}

STAND_IN = """
import dataclasses, json, os, signal, sys, time
from pathlib import Path
from lowprec_jax.cli.config_file import load_config
from lowprec_jax.config_text import dump_config
from lowprec_jax.training.config import TrainConfig

words = sys.argv[1:]
config = load_config(TrainConfig, words[1], words[2:])
run = Path(config.run_path)
here = Path(__file__).parent
with (here / "calls.txt").open("a") as calls:
    print(config.name, config.seed, config.steps, config.resume, file=calls)
assert (run / "metrics.jsonl").exists() == config.resume
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text(dump_config(config))
losses = dict(line.split() for line in (here / "losses.txt").open())
loss = float(losses[f"{config.name}{config.seed}"])
records = [{"step": n, "loss": loss + 1 / n} for n in range(1, config.steps + 1)]
records.append({"step": config.steps, "validation_loss": loss})
(run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records))
how = here / f"{config.name}{config.seed}.py"
if how.exists():
    exec(how.read_text())
summary = {"steps": config.steps, "validation_loss": loss, "best_validation_loss": loss - 0.1}
(run / "summary.json").write_text(json.dumps({**summary, "tokens_per_second": 1234.5}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with configs ``a`` and ``b`` of four steps and a stand-in for train."""
    monkeypatch.chdir(tmp_path)
    stand_in = tmp_path / "train.py"
    stand_in.write_text(STAND_IN, encoding="utf-8")
    for name in "ab":
        text = f"name: {name}\nsteps: 4\noptim: {{warmup_steps: 1}}\n"
        (tmp_path / name).write_text(text, encoding="utf-8")
    lines = [f"{name}{seed} {loss}\n" for (name, seed), loss in LOSSES.items()]
    (tmp_path / "losses.txt").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(sweep, "_TRAIN", (sys.executable, str(stand_in)))
    return tmp_path


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def happens(folder: Path, run: str, code: str) -> None:
    """Lets a run do something else once its metrics are written."""
    (folder / f"{run}.py").write_text(textwrap.dedent(code), encoding="utf-8")


def test_sweep__one_config__gives_mean_and_standard_error(folder, capsys):
    assert main(["sweep", "--config", "a", "--seeds", "0,1,2", "--steps", "5"]) == 0
    assert calls(folder) == [f"a {seed} 5 False" for seed in (0, 1, 2)]
    (result,) = json.loads((folder / "runs/a/sweep.json").read_text())
    losses = [LOSSES["a", seed] for seed in (0, 1, 2)]
    mean, error = result["validation_loss"].values()
    assert math.isclose(mean, 2.2)
    assert math.isclose(error, statistics.stdev(losses) / math.sqrt(3))
    assert math.isclose(result["best_validation_loss"]["mean"], 2.1)
    assert [run["validation_loss"] for run in result["runs"]] == losses
    assert [run["run_dir"] for run in result["runs"]] == [f"runs/a/seed_{n}" for n in (0, 1, 2)]
    assert result["difference"] is None
    shown = capsys.readouterr().out
    for part in ("[3/3] a, seed 2: runs/a/seed_2", "2.2000 ± 0.1528", "1,234"):
        assert part in shown
    assert (folder / "runs/a/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep__several_configs__are_compared_by_pairs_of_seeds(folder, capsys):
    assert main(["sweep", "--configs", "a,b", "--seeds", "2,0,1", "--plots", "False"]) == 0
    assert calls(folder)[:3] == ["a 2 4 False", "b 2 4 False", "a 0 4 False"]
    first, second = json.loads((folder / "runs/a_vs_b/sweep.json").read_text())
    assert second["difference_to"] == "a"
    assert math.isclose(second["difference"]["mean"], 0.2)
    # The differences are 0.1, 0.2 and 0.3: unpaired, the error would be 0.25.
    assert math.isclose(second["difference"]["standard_error"], 0.1 / math.sqrt(3))
    assert first["difference_to"] is None
    assert "b - a, paired by seed: 0.2000 ± 0.0577" in capsys.readouterr().out
    assert not (folder / "runs/a_vs_b/sweep.png").exists()


def test_sweep__one_seed__has_no_standard_error(folder, capsys):
    assert main(["sweep", "--config", "a", "--seeds", "0"]) == 0
    (result,) = json.loads((folder / "runs/a/sweep.json").read_text())
    assert result["validation_loss"] == {"mean": 2.0, "standard_error": None}
    assert "±" not in capsys.readouterr().out


def test_sweep__again__trains_only_what_is_missing(folder, capsys):
    words = ["sweep", "--config", "a", "--seeds"]
    assert main([*words, "0,1"]) == 0
    before = (folder / "runs/a/seed_0/summary.json").stat().st_mtime_ns
    assert main([*words, "0,1,2"]) == 0
    assert calls(folder)[2:] == ["a 2 4 False"]
    assert (folder / "runs/a/seed_0/summary.json").stat().st_mtime_ns == before
    assert "seed_1 is complete" in capsys.readouterr().out
    assert main([*words, "0", "--steps", "6"]) == 0  # longer: goes on
    assert calls(folder)[3:] == ["a 0 6 True"]


def test_sweep__stopped_run__ends_the_sweep_with_4_and_goes_on_later(folder, capsys):
    happens(folder, "a1", "sys.exit(4)")
    words = ["sweep", "--config", "a", "--seeds", "0,1,2"]
    assert main(words) == 4
    assert "a, seed 1 was stopped. The same command goes on" in capsys.readouterr().err
    assert len(calls(folder)) == 2
    (folder / "a1.py").unlink()
    assert main(words) == 0
    assert calls(folder)[2:] == ["a 1 4 True", "a 2 4 False"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [("sys.exit(5)", 5), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)],
)
def test_sweep__failed_run__passes_its_code_on_and_is_named(folder, capsys, code, expected):
    happens(folder, "a0", code)
    assert main(["sweep", "--config", "a", "--seeds", "0,1"]) == expected
    assert f"a, seed 0 ended with exit code {expected}" in capsys.readouterr().err
    assert len(calls(folder)) == 1
    assert not (folder / "runs/a/sweep.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sweep__signal__reaches_the_run_once_and_none_is_left(folder, number):
    happens(
        folder,
        "a0",
        """
        received = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, frame: received.append(n))
        (here / "ready").write_text(str(os.getpid()))
        deadline = time.monotonic() + 30
        while not received and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # for a second one
        (here / "received").write_text(repr([int(n) for n in received]))
        sys.exit(4)
        """,
    )
    code = (
        "import sys; from lowprec_jax.cli import sweep; "
        f"sweep._TRAIN = {(sys.executable, str(folder / 'train.py'))!r}; "
        "sys.exit(sweep.run_sweep(['--config', 'a', '--seeds', '0,1']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        while not (folder / "ready").exists() or not (folder / "ready").read_text():
            assert process.poll() is None
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 4
    assert b"Traceback" not in err
    assert (folder / "received").read_text() == f"[{int(number)}]"
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "ready").read_text()), 0)
    assert len(calls(folder)) == 1


def test_sweep__run_that_ends_well_in_spite_of_a_signal__is_the_last(folder):
    happens(folder, "a0", "os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.2)")
    stand_in = (folder / "train.py").read_text()
    ignoring = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    (folder / "train.py").write_text(ignoring + stand_in)
    assert main(["sweep", "--config", "a", "--seeds", "0,1"]) == 4
    assert len(calls(folder)) == 1


def test_sweep__directory_of_a_run_with_other_options__is_refused_before_any_runs(folder, capsys):
    assert main(["sweep", "--config", "a", "--seeds", "1"]) == 0
    words = ["sweep", "--config", "a", "--seeds", "0,1"]
    for option, value in [("--optim.b1", "0.5"), ("--eval_windows", "7")]:
        assert main([*words, option, value]) == 2
        message = capsys.readouterr().err
        assert f"runs/a/seed_1 holds a run with other options: {option[2:]}" in message
    assert len(calls(folder)) == 1


def test_sweep__early_stopping__counts_as_complete(folder):
    happens(folder, "a0", "config = dataclasses.replace(config, steps=4)")
    words = ["sweep", "--config", "a", "--seeds", "0", "--early_stopping", "2"]
    assert main(words) == 0
    summary = folder / "runs/a/seed_0/summary.json"
    summary.write_text(summary.read_text().replace('"steps": 4', '"steps": 3'))
    metrics = folder / "runs/a/seed_0/metrics.jsonl"
    metrics.write_text(
        '{"step": 3, "loss": 2.0, "skipped": 0}\n{"step": 3, "validation_loss": 2.0}\n'
    )
    assert main(words) == 0
    assert len(calls(folder)) == 1
    metrics.write_text(metrics.read_text() + '{"step": 4, "loss": 2.0}\n')  # it was going on
    assert main(words) == 0
    assert len(calls(folder)) == 2


def test_sweep__loss_that_is_not_a_number__is_null_in_the_file(folder):
    lines = (folder / "losses.txt").read_text().replace("a0 2.0", "a0 nan")
    (folder / "losses.txt").write_text(lines)
    assert main(["sweep", "--config", "a", "--seeds", "0,1", "--plots", "False"]) == 0
    text = (folder / "runs/a/sweep.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)[0]["validation_loss"]["mean"] is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("", "--seeds is ''; allowed: whole numbers"),
        ("--seeds", "expected one argument"),
        ("--seeds 0,x", "--seeds is '0,x'"),
        ("--seeds 0,,1", "--seeds is '0,,1'"),
        ("--seeds=-1", "--seeds is '-1'"),
        ("--seeds 4294967296", "--seeds is"),
        ("--seeds " + "9" * 5000, "--seeds is"),
        ("--seeds 1,01", "--seeds 1,1: one is given twice"),
        ("--seeds 0 --configs a,a", "--configs a,a: one is given twice"),
        ("--seeds 0 --config gone", "No config file 'gone'"),
        ("--seeds 0 --seed 1", "sets --seed itself"),
        ("--seeds 0 --seed=1", "sets --seed itself"),
        ("--seeds 0 --configs a,b --name c", "a and b would both write to runs/c"),
        ("--seeds 0 --configs a,b --run_dir c", "a and b would both write to c"),
        ("--seeds 0 --stpes 3", "Nearest: steps"),
        ("--seeds 0 --sedes 3", "Nearest: seed"),
        ("--seeds 0 --optim.b1 7", "b1 is 7.0"),
        ("--seeds 0 word", "'word' is not an option"),
    ],
)
def test_sweep__bad_words__are_refused_before_anything_runs(folder, words, part):
    with pytest.raises(UserError) as caught:
        sweep.run_sweep(words.split())
    assert part in str(caught.value)
    assert calls(folder) == []
    assert not (folder / "runs").exists()


def test_sweep__help__shows_its_options_and_starts_no_jax():
    code = (
        "import sys; from lowprec_jax.cli.main import main; code = main(['sweep', '--help']); "
        "sys.exit('jax' in sys.modules or code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for part in ("--seeds", "--configs", "--optim.learning_rate"):
        assert part in done.stdout


def test_sweep__real_runs__are_those_of_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")
    (tmp_path / "text.txt").write_text("some text to learn from\n" * 99, encoding="utf-8")
    sizes = "--model.num_layers 1 --model.num_heads 2 --model.width 16 --model.context 8"
    words = f"--config smoke --data.source text.txt --steps 2 --optim.warmup_steps 1 {sizes}"
    words += (
        " --precision.recipe none --eval_windows 4 --sample_tokens 0 --progress False --plots False"
    )
    assert main(["sweep", "--seeds", "0,1", *words.split()]) == 0
    (result,) = json.loads((tmp_path / "runs/smoke/sweep.json").read_text())
    summaries = [
        json.loads((tmp_path / f"runs/smoke/seed_{seed}/summary.json").read_text())
        for seed in (0, 1)
    ]
    losses = [summary["validation_loss"] for summary in summaries]
    assert [run["validation_loss"] for run in result["runs"]] == losses
    assert losses[0] != losses[1]
    assert main(["sweep", "--seeds", "1,0", *words.split()]) == 0  # read, in another order
    (again,) = json.loads((tmp_path / "runs/smoke/sweep.json").read_text())
    assert [run["validation_loss"] for run in again["runs"]] == losses[::-1]
