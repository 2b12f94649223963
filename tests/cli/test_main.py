"""The command in a subprocess: exit codes, messages, speed, and what is imported."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import lowprec_jax.cli.main as main_module
from lowprec_jax.cli.main import main
from lowprec_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_main__no_subcommand_or_help__lists_subcommands(words, capsys):
    assert main(words) == 0
    assert "train" in capsys.readouterr().out


def test_main__unknown_subcommand__names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--optim.learning_rat", "1"], "Nearest: optim.learning_rate (float, default 0.001)"),
        (["--confg", "x"], "Nearest: config (file or name"),
        (["--config"], "--config needs"),
        (["--config", "--smoke"], "--config needs"),
        (["--config", "smok"], "Did you mean 'smoke'?"),
        (["--config=smoke", "--smoke"], "One config a run"),
        (["--batch_size", "100", "--mesh.data", "8"], "8 devices (mesh.data x mesh.fsdp). Use 96"),
        (["--smoke", "--data.tokenizer", "chra"], "Did you mean 'char'?"),
    ],
)
def test_main__bad_input__is_one_paragraph_and_code_2(words, part, capsys):
    assert main(["train", *words]) == 2
    shown = capsys.readouterr()
    assert part in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_main__bad_yaml_key_in_a_subprocess__code_2_without_traceback(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {learning_rat: 1}", encoding="utf-8")
    done = run(str(ROOT / "train.py"), "--config", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "'optim.learning_rat'" in done.stderr
    assert "mine.yaml" in done.stderr
    assert done.stderr.count("\n") == 1


def test_main__module__is_the_same_command():
    done = run("-m", "lowprec_jax", "train", "--stpes", "3")
    assert done.returncode == 2
    assert "Nearest: steps" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "--smoke", "--help"], []])
def test_main__help_in_a_subprocess__is_quick_and_starts_no_jax(words):
    code = (
        f"import sys; from lowprec_jax.cli.main import main; code = main({words!r}); "
        "loaded = {'jax', 'flax', 'optax', 'matplotlib'} & set(sys.modules); "
        "sys.exit(code if not loaded else f'loaded: {loaded}')"
    )
    start = time.perf_counter()
    done = run("-c", code)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    assert seconds < 10  # 0.4 s alone; JAX by itself takes 1 to 3 s, twice that when shared


def test_main__collectives__shows_the_step_on_emulated_devices(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    sizes = ["--model.num_layers", "1", "--model.width", "16", "--model.context", "8"]
    words = ["collectives", "--config", "smoke", "--mesh.data", "2", *sizes]
    done = run("-m", "lowprec_jax", *words)
    assert done.returncode == 0, done.stderr
    title, compiled, written = done.stdout.split("\n\n")
    assert title.startswith("smoke: one training step, recipe fp8_delayed, data 2 x fsdp 1")
    # The token count; gradients, loss and counts; the amaxes.
    assert "all-reduce  f32           3" in compiled
    assert "all-reduce  f32          12" in written


def test_main__help__shows_options_values_and_configs(capsys):
    assert main(["train", "--smoke", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ["--config", "--smoke", "shakespeare_char", "--optim.learning_rate", "default: 40"]:
        assert part in shown


def _raising(error: BaseException):
    def command(words: list[str]) -> None:
        raise error

    return main_module._Command("", command)


def test_main__user_error__is_shown_on_one_line(monkeypatch, capsys):
    monkeypatch.setitem(main_module._COMMANDS, "probe", _raising(UserError("first\n  second")))
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == "lowprec_jax: error: first second\n"


def test_main__data_error__is_bad_input(monkeypatch, capsys):
    data = pytest.importorskip("lowprec_jax.data")
    monkeypatch.setitem(main_module._COMMANDS, "probe", _raising(data.DataError("no text")))
    assert main(["probe"]) == 2
    assert "no text" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("ours"), SystemExit(3), SystemExit("ours")])
def test_main__any_other_error__is_not_hidden(monkeypatch, error):
    monkeypatch.setitem(main_module._COMMANDS, "probe", _raising(error))
    with pytest.raises(type(error)):
        main(["probe"])
