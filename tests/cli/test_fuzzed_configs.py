"""Wrong configs, in files and on the command line: exit code 2, the key named, no traceback.

What is wrong is said here a second time, by hand, not read from the checks. Where a run would begin
an error is raised instead, so that a config that slips through is seen as such.
"""

import contextlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lowprec_jax.cli.main as main_module
from lowprec_jax.cli.main import main
from lowprec_jax.cli.typed_tree import option_names
from lowprec_jax.config_text import dump_config
from lowprec_jax.training.config import TrainConfig

pytestmark = pytest.mark.reliability


class _AcceptedError(Exception):
    """The config was taken for good; in place of a run."""


class _Mistake(NamedTuple):
    """A wrong value of an option, and a pattern for how the message names it."""

    key: str
    value: Any
    named: str


# The largest value that is too small, of every option that is a whole number.
_INTS = {
    **dict.fromkeys(["steps", "batch_size", "log_every", "keep_checkpoints"], 0),
    **dict.fromkeys(["seed", "eval_every", "early_stopping", "checkpoint_every"], -1),
    **dict.fromkeys(["sample_tokens", "profile_start", "profile_steps"], -1),
    **{f"model.{name}": 0 for name in ("num_layers", "num_heads", "width", "context")},
    "data.vocab_size": 0,
    "precision.history_length": 0,
    "precision.margin": -1,
    "optim.warmup_steps": -1,
    "optim.accumulate": 0,
    **{f"mesh.{name}": 0 for name in ("data", "fsdp", "tensor")},
    "distributed.timeout_seconds": 0,
    "distributed.heartbeat_seconds": 4,
    **{f"guard.{name}": 0 for name in ("max_skipped", "max_spikes")},
    **{f"guard.{name}": -1 for name in ("max_rollbacks", "promote_steps")},
    "guard.min_window": 1,
    "guard.window": 63,  # below min_window
    **{f"health.{name}": -1 for name in ("every", "sqnr_every")},
    "health.scale_age": 0,
}
_INTS_OR_NULL = {
    **dict.fromkeys(["eval_windows", "model.num_kv_heads", "model.mlp_width"], 0),
    "optim.base_width": 0,
    "distributed.num_processes": 0,
    "distributed.process_id": -1,
}
_FLOATS_OR_NULL = {"model.residual_tau": (0.0, 1.0, -0.1)}
# Numbers outside of what is allowed, besides those that are wrong for all.
_FLOATS = {
    "stall_timeout": (-1e-9, 1e10),
    "model.rope_base": (0.0, -1.0, 1e39),
    "model.init_scale": (0.0, -0.02, 1e39),
    "data.validation_fraction": (0.0, 1.0),
    "optim.learning_rate": (0.0, -1e-3, 1e39),
    "optim.decay_fraction": (0.0, 1.1),
    "optim.final_fraction": (-0.1, 1.1),
    **{f"optim.{name}": (-0.1, 1.0) for name in ("b1", "b2", "ema_decay")},
    "optim.weight_decay": (-1e-9, 1e39),
    "optim.clip_norm": (0.0, -1.0, 1e39),
    "guard.sigma": (0.0, -6.0, 1e39),
    **{f"health.{name}": (0.0, -0.5, 1.5) for name in ("saturated", "underflow")},
}
_BOOLS = (
    *("keep_best", "resume", "allow_changes", "plots", "progress", "model.tied_head"),
    *("model.scan_layers", "mesh.zero1", "mesh.sequence"),
)
_CHOICES = (
    "model.parametrization",
    *("model.mlp", "model.remat", "model.compute_dtype", "model.param_dtype", "data.tokenizer"),
    *("precision.amax_reduction", "precision.scale_rounding", "precision.amax_scope"),
    *("optim.optimizer", "optim.schedule", "mesh.strategy", "mesh.reduce", "distributed.mode"),
)
_TEXTS = {
    "name": ("", "a/b", "..", "a b", "a\n", "x" * 200, "é" * 100),
    "run_dir": ("", "runs/{nam}", "{}", "a\0b"),
    "sample_prompt": ("",),
    "wandb": (),
    "data.source": ("",),
    "precision.recipe": ("",),
    "precision.target": ("",),
    "precision.backend": ("",),
    "distributed.coordinator": ("", "host", "host:", "host:0", "host:99999", ":9", "h:x"),
}
_SECTIONS = ("model", "data", "precision", "optim", "mesh", "distributed", "guard", "health")
_LISTS = ("precision.rules", "precision.phases")
_FILE_OR_NOTHING = {
    "distributed.coordinator",
    "precision.target",
    "precision.backend",
}  # text that may be null

# Items of lists: the list, and how the message begins to name what is wrong with it.
_RULES = [
    ([{"path": "a"}], r"'precision\.rules\.0\.recipe'"),
    ([{"path": "a", "recipe": ""}], r"precision\.rules\.0: recipe\b"),
    ([{"path": "a", "recipe": 8}], r"'precision\.rules\.0\.recipe'"),
    ([{"path": "(", "recipe": "none"}], r"precision\.rules\.0: path\b"),
    ([{"path": "(" * 5000 + ")" * 5000, "recipe": "none"}], r"precision\.rules\.0: path\b"),
    ([{"path": "a{99999999999}", "recipe": "none"}], r"precision\.rules\.0: path\b"),
    ([{"path": "a", "recipe": "none", "pth": "b"}], r"'precision\.rules\.0\.pth'"),
    ([{"path": "a", "recipe": "none"}, {"recipe": "x"}], r"'precision\.rules\.1\.path'"),
]
_PHASES = [
    ([{}], r"precision\.phases\.0: step\b"),
    ([{"recipe": "none"}], r"precision\.phases\.0: step\b"),
    ([{"step": 9, "fraction": 0.5, "recipe": "none"}], r"precision\.phases\.0: step\b.*fraction"),
    ([{"step": 9}], r"precision\.phases\.0: a phase changes nothing"),
    ([{"step": 9, "recipe": ""}], r"precision\.phases\.0: recipe\b"),
    ([{"step": 9, "recipe": 8}], r"'precision\.phases\.0\.recipe'"),
    ([{"step": 9, "recipe": "none", "unitl": 4}], r"'precision\.phases\.0\.unitl'"),
    ([{"step": 9, "rules": {}}], r"'precision\.phases\.0\.rules'"),
    ([{"step": 9, "rules": [{"path": "a"}]}], r"'precision\.phases\.0\.rules\.0\.recipe'"),
    ([{"step": 9, "rules": [{"path": "[", "recipe": "x"}]}], r"precision\.phases\.0\.rules\.0: pa"),
    *(
        ([{"step": step, "recipe": "none"}], r"precision\.phases\.0(: |\.)step\b")
        for step in (0, -3, 2**31, 1.5, True, "9", [9], math.nan)
    ),
    *(
        ([{"fraction": part, "recipe": "none"}], r"precision\.phases\.0(: |\.)fraction\b")
        for part in (0, 0.0, 1, -0.5, math.nan, math.inf, True, "half", [])
    ),
    # One by one they are right.
    ([{"step": 40, "recipe": "x"}, {"step": 40, "recipe": "y"}], r"precision\.phases begin"),
    ([{"step": 40, "recipe": "x"}, {"fraction": 0.02, "recipe": "y"}], r"precision\.phases begin"),
    ([{"step": 2**30, "recipe": "x"}], r"precision\.phases begin"),
    ([{"fraction": 1e-9, "recipe": "x"}], r"precision\.phases begin"),
]


def _mistakes() -> list[_Mistake]:
    """Every wrong value of every option."""
    not_a_number = ("many", "", "0x10", True, [1], {"a": 1}, "\0")
    not_an_int = (*not_a_number, 1.5, math.nan, math.inf, 2**32, 10**30, -(2**63))
    not_a_float = (*not_a_number, math.nan, math.inf, -math.inf, 10**400, "nan", "inf")
    not_text = (3, 0.5, True, ["a"], {"a": "b"}, "\0", "a\ud800")
    values: dict[str, tuple] = {
        **{key: (*not_an_int, None, low, low - 1) for key, low in _INTS.items()},
        **{key: (*not_an_int, low, low - 1) for key, low in _INTS_OR_NULL.items()},
        **{key: (*not_a_float, None, *more) for key, more in _FLOATS.items()},
        **{key: (*not_a_float, *more) for key, more in _FLOATS_OR_NULL.items()},
        **dict.fromkeys(_BOOLS, ("yes", "", 1, 0.0, None, [], {"a": True})),
        **dict.fromkeys(_CHOICES, ("nonsense", "", 3, True, None, [], {"a": 1}, "\ud800")),
        **{key: (*not_text, *more) for key, more in _TEXTS.items()},
        **dict.fromkeys(_SECTIONS, ("text", 3, True, None, [1])),
        **dict.fromkeys(_LISTS, ("text", 3, True, None, {"a": 1}, ["a"], [None], [[]])),
    }
    found = [_Mistake(key, v, _named(key)) for key, some in values.items() for v in some]
    found += [_Mistake(key, None, _named(key)) for key in _TEXTS if key not in _FILE_OR_NOTHING]
    found += [_Mistake("precision.rules", value, named) for value, named in _RULES]
    found += [_Mistake("precision.phases", value, named) for value, named in _PHASES]
    return found


def _named(key: str) -> str:
    """``'optim.b1'`` (or an item of it), or ``optim: b1``."""
    section, _, last = key.rpartition(".")
    return rf"'{re.escape(key)}[.\d]*'|error: {f'{section}: ' if section else ''}{last}\b"


MISTAKES = _mistakes()


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Calls ``train``, which must refuse its words in one line; returns the line."""

    def begin(config: TrainConfig) -> None:
        raise _AcceptedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main_module, "prepare_environment", begin)

    def call(*words: str) -> str:
        code = main(["train", *words])
        shown = capsys.readouterr()
        assert code == 2
        assert re.fullmatch("lowprec_jax: error: .+\n", shown.err), shown.err
        assert shown.out == ""
        assert {path.suffix for path in tmp_path.iterdir()} <= {".yaml"}
        return shown.err

    return call


def _yaml(value: Any) -> str:
    """JSON, but for the numbers that JSON cannot write."""
    text = json.dumps(value)
    for name, spelled in (("NaN", ".nan"), ("-Infinity", "-.inf"), ("Infinity", ".inf")):
        text = text.replace(name, spelled)
    return text


def _nested(key: str, value: Any) -> dict[str, Any]:
    """``{"optim": {"b1": value}}`` of ``optim.b1``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _write(name: str, text: str) -> list[str]:
    """Writes a config file; returns the words that name it."""
    Path(name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return ["--config", name]


def _file(mistake: _Mistake) -> list[str]:
    return _write("bad.yaml", _yaml(_nested(mistake.key, mistake.value)))


def _base_file(mistake: _Mistake) -> list[str]:
    _write("base.yaml", _yaml(_nested(mistake.key, mistake.value)))
    # Another section: one in the file would hide a mistake in the same section of its base.
    other = (
        {"optim": {"b1": 0.9}} if mistake.key.startswith("model") else {"model": {"num_layers": 2}}
    )
    return _write("mine.yaml", _yaml({"extends": "base.yaml", **other}))


def _flags(mistake: _Mistake) -> list[str]:
    return [f"--{mistake.key}", _word(mistake.value)]


def _flag_with_equals(mistake: _Mistake) -> list[str]:
    return [f"--{mistake.key.replace('_', '-')}={_word(mistake.value)}"]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else _yaml(value)


def _is_bad_word(mistake: _Mistake) -> bool:
    """Whether the value is wrong on a command line too, where every word is text."""
    if mistake.key in _TEXTS:
        return isinstance(mistake.value, str)
    return mistake.key not in _LISTS


def test_mistakes__there_are_some_for_every_option():
    assert {m.key for m in MISTAKES} == set(option_names(TrainConfig))


@pytest.mark.parametrize("key", option_names(TrainConfig))
def test_train__wrong_value_in_a_file__is_refused_by_name(refusal, key):
    for mistake in (m for m in MISTAKES if m.key == key):
        assert re.search(mistake.named, refusal(*_file(mistake))), mistake
    with pytest.raises(_AcceptedError):
        refusal()  # the same call, with nothing wrong


@pytest.mark.parametrize("seed", range(200))
def test_train__fuzzed_config__is_refused_by_name(refusal, seed):
    draw = random.Random(seed)
    mistake = draw.choice(_typos(draw)) if draw.random() < 0.2 else draw.choice(MISTAKES)
    ways = [_file, _base_file]
    if _is_bad_word(mistake):
        ways += 2 * [_flags, _flag_with_equals]
    words = draw.choice(ways)(mistake)
    right = ["--steps", "700", "--optim.b1=0.8", "--resume", "--model.mlp_width", "null"]
    message = refusal(*right, *words) if draw.random() < 0.5 else refusal(*words)
    assert re.search(mistake.named, message), (mistake, message)


def _typos(draw: random.Random) -> list[_Mistake]:
    """Names of options with a letter doubled, lost or exchanged, or in another section."""
    known = option_names(TrainConfig)
    wrong = set()
    for key in known:
        section, dot, last = key.rpartition(".")
        at = draw.randrange(len(last))
        letter = draw.choice("qz_9")
        wrong |= {f"{section}{dot}{last[:at]}{x}{last[at + 1 :]}" for x in ("", letter)}
        wrong |= {f"{key}{letter}", f"{draw.choice(_SECTIONS)}.{last}"}
    return [_Mistake(k, 1, f"'{re.escape(k)}'") for k in sorted(wrong - set(known)) if k[-1] != "."]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--optim.warmup_steps 900 --steps 900", "error: optim.warmup_steps 900 .* steps 900"),
        ("--batch_size 9 --mesh.data 2", "error: batch_size 9 .*mesh.data"),
        ("--batch_size 12 --optim.accumulate 5", "error: batch_size 12 .*optim.accumulate"),
        ("--model.width 130", "error: model: width 130 .* num_heads 4"),
        ("--model.width 12", "error: model: width 12 .* even"),
        ("--model.num_kv_heads 3", "error: model: num_heads 4 .* num_kv_heads 3"),
        # Not a second is spent on the divisors of this.
        (
            "--model.num_heads 1999999998 --model.num_kv_heads 4 --model.width 3999999996",
            "error: model: width",
        ),
        (
            "--model.num_heads 999999998 --model.num_kv_heads 4 --model.width 1999999996",
            "error: model: num_heads 999999998 .* 499999999, 999999998",
        ),
        ("--data.tokenizer bpe --data.vocab_size 256", "error: data: vocab_size 256"),
        ("--guard.min_window 2000", "error: guard: window is 128; allowed: min_window 2000"),
        ("--mesh.strategy pmap --mesh.fsdp 2", "error: mesh: strategy"),
        ("--mesh.strategy jit --mesh.reduce fp8", "error: mesh: reduce"),
        ("--mesh.sequence", "error: mesh: sequence"),
        ("--precision.phases.0.step 3", "'precision.phases.0.step'"),
        ("--precision.phases", "--precision.phases"),
        ("--steps --seed 1", "'steps' takes one value"),
        ("--seed 1 2", "'seed' takes one value"),
        ("seed 1", "'seed' is not an option"),
        ("--seed 1 -steps", "'seed' takes one value|'-steps'"),
        ("--model", "'model' is a section; .* --model.num_layers"),
        ("--no-resume", "'no_resume'"),
        ("--=1", "No option ''"),
    ],
)
def test_train__words_that_do_not_fit_together__are_refused_by_name(refusal, words, named):
    assert re.search(named, refusal(*words.split()))


def test_train__items_of_phases_on_the_command_line__are_checked_like_those_of_a_file(refusal):
    phases = [{"step": 50, "recipe": "none"}, {"fraction": 0.5, "recipe": "fp8_current"}]
    file = _write("phases.yaml", _yaml({"precision": {"phases": phases}}))
    with pytest.raises(_AcceptedError):
        refusal(*file, "--precision.phases.0.step", "60")
    for name, word in [("0.step", "0"), ("0.step", "x"), ("1.fraction", ".nan"), ("0.recipe", "")]:
        index, last = name.split(".")
        message = refusal(*file, f"--precision.phases.{name}", word)
        assert re.search(rf"precision\.phases\.{index}(: |\.){last}\b", message)
    assert "precision.phases begin" in refusal(*file, "--precision.phases.0.step", "750")


def test_train__more_devices_than_a_cpu_emulates__are_refused(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert main(["train", "--mesh.data", "5000", "--batch_size", "5000"]) == 2
    assert "mesh.data x mesh.fsdp x mesh.tensor is 5000 devices" in capsys.readouterr().err


_BOMB = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: !!python/object/apply:os.system ['touch hacked']", "tag"),
        ("!!python/object/new:os.system ['touch hacked']", "tag"),
        ("name: !!python/name:os.system", "tag"),
        ("!<tag:yaml.org,2002:python/object:os.x> {}", "tag"),
        ("%TAG !p! tag:yaml.org,2002:python/\n---\nname: !p!name:os.system", "tag"),
        ("seed: !!int 3", "tag"),
        ("model: !!map {width: 64}", "tag"),
        ("x0: &x0 lol\n" + _BOMB, "anchor"),
        ("seed: &a 3", "anchor"),
        ("seed: *a", "alias"),
        ("model: &m {width: 64}\noptim: {<<: *m}", "anchor"),
        ("<<: {seed: 3}", "No option '<<'"),
        ("seed: 1\nsteps: 900\nseed: 2", "'seed' is given twice"),
        ("optim: {b1: 0.5, b2: 0.5, b1: 0.6}", "'b1' is given twice"),
        ("precision: {phases: [{step: 5, step: 6, recipe: none}]}", "'step' is given twice"),
        ("seed: 1\n---\nseed: 2", "not a valid config file"),
        ("seed: " + "[" * 10_000, "nested too deeply"),
        ("seed: " + "{a: " * 10_000, "nested too deeply"),
        ("\n".join(" " * i + "a:" for i in range(200)), "nested too deeply"),
        ("- " * 200 + "1", "nested too deeply"),
        ("? [a]\n: 1", "unhashable"),
        ("3: 4", "Key '3'"),
        ("model: {~: 4}", "Key 'model.None'"),
        ("model: {'': 4}", "'model.'"),
        ("extends: other.yaml", "'other.yaml'"),
        ("extends: bad.yaml", "extend one another"),
        ("extends: " + "x" * 5000, "extends: no file"),
        ('extends: "a\\0b"', "extends: no file"),
        ("extends: /dev/zero", "extends: no file"),
        ("extends: [a.yaml]", "extends is"),
        ("seed: " + "9" * 5000, "not a valid config file"),
        ("seed: \x07", "not a valid config file"),
        ("{", "not a valid config file"),
        ("%YAML 9.9\n---\nseed: 1", "not a valid config file"),
        ("import os\nos.system('touch hacked')", "bad.yaml"),
    ],
)
def test_train__file_that_is_no_plain_yaml__is_refused(refusal, text, part):
    message = refusal(*_write("bad.yaml", text))
    assert part in message
    assert "bad.yaml" in message


@pytest.mark.parametrize(
    "junk",
    [
        bytes(range(256)),
        b"\x00" * 4096,
        b"\x7fELF\x02\x01\x01",
        b"\x89PNG\r\n\x1a\n",
        b"\x80\x04\x95\x10\x00",
        b"PK\x03\x04",
        b"\xff\xfes\x00e\x00e\x00d\x00",
        b"seed: \xff",
        b"seed: \xed\xa0\x80",
    ],
)
def test_train__file_of_bytes__is_refused(refusal, junk):
    Path("bad.yaml").write_bytes(junk)
    assert "bad.yaml" in refusal("--config", "bad.yaml")


@pytest.mark.parametrize("name", ["", ".", "/dev/null", "x" * 5000, "a\0b", "gone.yaml", "\ud800"])
def test_train__config_that_is_no_file__is_refused(refusal, name):
    assert "config" in refusal(f"--config={name}")


def test_train__damaged_files__are_read_or_refused_in_one_line(refusal):
    """Some damage leaves a valid config, such as in a name."""
    draw = random.Random(0)
    refused = 0
    for _ in range(100):
        Path("bad.yaml").write_bytes(_damaged(dump_config(TrainConfig()).encode(), draw))
        with contextlib.suppress(_AcceptedError):
            assert "bad.yaml" in refusal("--config", "bad.yaml")
            refused += 1
    assert refused > 80


def _damaged(text: bytes, draw: random.Random) -> bytes:
    data = bytearray(text)
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + draw.randrange(1, 40)]
            case 2:
                data[at:at] = draw.randbytes(3)
            case _:
                data[at:at] = draw.choice([b"{", b"]", b"&", b"*", b"!", b"\t", b"'", b": ", b"- "])
    return bytes(data)
