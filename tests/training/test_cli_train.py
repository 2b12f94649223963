"""``train`` as people call it: bad input is one paragraph and code 2, and blocks nothing.

Most calls are made in this process, which has eight emulated devices; a subprocess costs seconds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowprec_jax.cli.main import main

ROOT = Path(__file__).parents[2]
_TINY = (
    "--model.num_layers 1 --model.num_heads 2 --model.width 32 --model.context 16 --steps 2 "
    "--optim.warmup_steps 1 --batch_size 8 --eval_every 0 --eval_windows 4 --progress False"
)
TINY = _TINY.split()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Runs go to ``runs/`` of a fresh working directory; the environment is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    (tmp_path / "text.txt").write_text("some text to learn from\n" * 99, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("ten chars!", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 99)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--optim.lerning_rate", "1"], ["optim.lerning_rate", "optim.learning_rate"]),
        (["--steps", "many"], ["steps", "many", "int"]),
        (["--precision.recipe", "fp8_delayd"], ["fp8_delayd", "Did you mean 'fp8_delayed'?"]),
        (["--batch_size", "9", "--mesh.data", "8"], ["batch_size 9", "8 devices", "8 or 16"]),
        (["--data.source", "gone.txt"], ["'gone.txt'", "neither a file nor a folder"]),
        (["--data.source", "empty.txt"], ["'empty.txt' holds no text"]),
        (["--data.source", "latin.txt"], ["latin.txt", "not UTF-8", "0xe9", "offset 1"]),
        (["--data.source", "short.txt"], ["context 16", "corpus has 9"]),
        (["--mesh.data", "64", "--batch_size", "64"], ["mesh.data 64", "there are 8", "or less"]),
        (["--resume", "True"], ["runs/quickstart holds no run to resume"]),
    ],
    ids=[
        "unknown_key",
        "wrong_type",
        "unknown_recipe",
        "batch_not_divisible",
        "missing_text",
        "empty_text",
        "not_utf8",
        "context_longer_than_text",
        "impossible_mesh",
        "nothing_to_resume",
    ],
)
def test_train__bad_input__is_one_paragraph_and_leaves_nothing(words, parts, capsys):
    assert main(["train", "--data.source", "text.txt", *TINY, *words]) == 2
    shown = capsys.readouterr()
    for part in parts:
        assert part in shown.err
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    assert not Path("runs").exists()


def test_train__rule_that_matches_nothing__lists_the_layers(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "precision: {rules: [{path: blocks/mlp/dwon, recipe: none}]}", encoding="utf-8"
    )
    words = ["--config", "mine.yaml", "--data.source", "text.txt", *TINY]
    assert main(["train", *words]) == 2
    shown = capsys.readouterr().err
    assert "'blocks/mlp/dwon' matches no layer" in shown
    assert "blocks/mlp/down" in shown
    assert not Path("runs").exists()


def call(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--data.source", "text.txt", *TINY, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_train__a_subprocess_refused_then_corrected__runs_in_the_same_directory(tmp_path):
    """Rules that leave no FP8 are found after the run directory is made."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("precision: {rules: [{path: .*, recipe: none}]}", encoding="utf-8")
    refused = call("--config", "rules.yaml")
    assert refused.returncode == 2, refused.stderr
    assert "'fp8_delayed' was asked for" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = call("--mesh.data", "2", "--sample_tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "12 exact upcasts" in done.stdout or "12 native" in done.stdout
    assert "2 x cpu" in done.stdout  # emulated: the command asked XLA for them
    assert {"summary.json", "loss.png"} <= {p.name for p in Path("runs/quickstart").iterdir()}
