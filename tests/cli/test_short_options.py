"""Short options: what they stand for, where, and what is refused."""

import dataclasses

import pytest

from lowprec_jax.cli import sweep
from lowprec_jax.cli.config_file import load_config, resolve_config_path
from lowprec_jax.cli.main import main
from lowprec_jax.cli.short_options import SHORT_OPTIONS
from lowprec_jax.errors import ConfigError
from lowprec_jax.training.config import TrainConfig


def target_of(*words: str) -> str | None:
    path = resolve_config_path("smoke")
    return load_config(TrainConfig, path, words).precision.target


@pytest.mark.parametrize("words", [("--target", "amd-mi300"), ("--target=amd-mi300",)])
def test_target__alone__is_precision_target(words):
    assert target_of(*words) == "amd-mi300"
    assert target_of("--batch_size", "4", *words, "--seed", "1") == "amd-mi300"


def test_target__null__is_none():
    assert target_of("--target", "null") is None


def test_target__both_forms_alike__are_one():
    assert target_of("--target", "tpu-v7", "--precision.target=tpu-v7") == "tpu-v7"


@pytest.mark.parametrize(
    "words",
    [
        ("--target", "tpu-v7", "--precision.target", "amd-mi300"),
        ("--precision.target=amd-mi300", "--target=tpu-v7"),
    ],
)
def test_target__both_forms_and_different__is_refused(words):
    with pytest.raises(ConfigError, match=r"--target is 'tpu-v7' and --precision\.target is 'amd"):
        target_of(*words)


def test_target__twice_in_one_form__is_the_last_as_of_any_option():
    assert target_of("--target", "tpu-v7", "--target", "amd-mi300") == "amd-mi300"


def test_target__no_value_or_misspelt__is_explained():
    with pytest.raises(ConfigError, match=r"'precision\.target' takes one value, given: nothing"):
        target_of("--target")
    with pytest.raises(ConfigError, match=r"No option 'targte'. Nearest: target"):
        target_of("--targte", "tpu-v7")


def test_short_options__each__is_an_option_of_training(capsys):
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, dotted in SHORT_OPTIONS.items():
        assert f"--{name} is short for --{dotted}." in shown
        assert f" --{dotted} " in shown


@dataclasses.dataclass(frozen=True)
class Section:
    target: int = 1


@dataclasses.dataclass(frozen=True)
class OwnTarget:
    target: int = 1
    precision: Section = Section()


@dataclasses.dataclass(frozen=True)
class NoTarget:
    size: int = 1


def test_short_options__config_with_an_option_of_that_name__keeps_it(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("{}", encoding="utf-8")
    config = load_config(OwnTarget, path, ["--target", "3"])
    assert (config.target, config.precision.target) == (3, 1)


def test_short_options__config_without_the_option__knows_none(tmp_path, capsys):
    path = tmp_path / "empty.yaml"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="No option 'target'"):
        load_config(NoTarget, path, ["--target", "3"])
    with pytest.raises(SystemExit):
        load_config(NoTarget, path, ["--help"])
    assert "short for" not in capsys.readouterr().out


def test_sweep__target__reaches_every_run():
    words = ["--smoke", "--seeds", "0,1", "--target", "amd-mi300"]
    labels, seeds, overrides = sweep._parse(words)
    config = sweep._load(labels[0], overrides)
    assert config.precision.target == "amd-mi300"
    jobs = [sweep._job(labels[0], config, seed, overrides) for seed in seeds]
    for job in jobs:
        assert target_of(*job.words[2:]) == "amd-mi300"
