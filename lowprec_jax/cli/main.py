"""The command ``lowprec_jax``: a table of subcommands.

A subcommand is a row of `_COMMANDS`; it imports what it needs itself, so that the help stays
quick. Public name: `main`.
"""

import io
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lowprec_jax.cli.environment import prepare_environment
from lowprec_jax.cli.registrations import take_imports
from lowprec_jax.errors import ConfigError, UserError, did_you_mean

__all__ = ["main"]

_TRAIN_OPTIONS = {
    "config": "file or name of a config, default quickstart",
    "smoke": "the config 'smoke': the whole program in less than a minute",
    "import": "module that registers recipes or formats of your own",
}


class _Command(NamedTuple):
    """A subcommand: its line in the help, and what runs it on the words after its name.

    It may return an exit code.
    """

    summary: str
    run: Callable[[list[str]], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code.

    0: done, 2: bad input (one paragraph on stderr says what and what to do), 3: another process of
    the run was lost, 4: stopped by a signal, to be resumed, 5: training went wrong again and again,
    6: no progress, see `stall_timeout`. Any other error is ours and keeps its traceback.

    Args:
      argv: words after the program's name; None: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line as it is written
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, rest = words[0], words[1:]
    try:
        if name not in _COMMANDS:
            raise UserError(
                f"No subcommand {name!r}. Known: {', '.join(_COMMANDS)}."
                f"{did_you_mean(name, _COMMANDS)}"
            )
        return _COMMANDS[name].run(take_imports(rest)) or 0
    except UserError as error:
        print(f"lowprec_jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            raise
        return 0  # --help of a subcommand


def _train(words: list[str]) -> int:
    from lowprec_jax.cli.config_file import load_config, resolve_config_path
    from lowprec_jax.training.config import TrainConfig

    name, overrides = _take_config(words)
    config = load_config(
        TrainConfig,
        resolve_config_path(name),
        overrides,
        prog="lowprec_jax train",
        description=_train_description(name),
        extra_options=_TRAIN_OPTIONS,
    )
    prepare_environment(config)

    from lowprec_jax.training.loop import train
    from lowprec_jax.training.signals import EXIT_STOPPED

    return EXIT_STOPPED if "stopped_by" in train(config) else 0


def _plan(words: list[str]) -> None:
    from lowprec_jax.cli.plan import run_plan

    run_plan(*_take_config(words))


def _collectives(words: list[str]) -> None:
    from lowprec_jax.cli.config_file import load_config, resolve_config_path
    from lowprec_jax.training.config import TrainConfig

    name, overrides = _take_config(words)
    path, prog = resolve_config_path(name), "lowprec_jax collectives"
    config = load_config(TrainConfig, path, overrides, prog=prog)
    prepare_environment(config)

    from lowprec_jax.training.communication import communication_report

    print(communication_report(config))


def _launch(words: list[str]) -> None:
    from lowprec_jax.cli.launch import run_launch

    if code := run_launch(words):
        raise SystemExit(code)


def _report(words: list[str]) -> None:
    from lowprec_jax.cli.report import run_report

    run_report(words)


def _formats(words: list[str]) -> None:
    from lowprec_jax.cli.formats import run_formats

    run_formats(words)


def _sweep(words: list[str]) -> int:
    from lowprec_jax.cli.sweep import run_sweep

    return run_sweep(words)


def _take_config(words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the name of the config, and the words that are overrides of it."""
    names: list[str] = []
    overrides: list[str] = []
    smoke = False
    remaining = iter(words)
    for word in remaining:
        if word == "--smoke":
            smoke = True
        elif word == "--config":
            value = next(remaining, "")
            if not value or value.startswith("--"):
                raise ConfigError("--config needs a file or a name, such as --config quickstart.")
            names.append(value)
        elif word.startswith("--config="):
            names.append(word.removeprefix("--config="))
        else:
            overrides.append(word)
    if len(names) + smoke > 1:
        given = [*(f"--config {n}" for n in names), *(["--smoke"] if smoke else [])]
        raise ConfigError(f"One config a run, given: {', '.join(given)}. Keep one.")
    if smoke:
        return "smoke", overrides
    return (names[0] if names else "quickstart"), overrides


def _train_description(name: str) -> str:
    from lowprec_jax.cli.config_file import config_names

    options = "; ".join(f"--{option}: {text}" for option, text in _TRAIN_OPTIONS.items())
    return (
        f"Trains a language model and writes a run directory. {options}. Configs by name: "
        f"{', '.join(config_names())}. The options below override the config {name!r}, whose "
        f"values are shown."
    )


def _overview() -> str:
    width = max(len(name) for name in _COMMANDS)
    lines = [f"  {name:{width}}  {command.summary}" for name, command in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: lowprec_jax SUBCOMMAND [options]",
            "",
            *lines,
            "",
            "lowprec_jax SUBCOMMAND --help shows its options.",
        ]
    )


_COMMANDS = {
    "train": _Command("train a model; writes a run directory", _train),
    "plan": _Command(
        "show which layers run in low precision, and why; with --target what it is worth", _plan
    ),
    "collectives": _Command(
        "show what one training step communicates: how often, how many bytes", _collectives
    ),
    "report": _Command("write the report of a run, finished or not: a page and pictures", _report),
    "sweep": _Command("train with several seeds, compare configs: means and errors", _sweep),
    "formats": _Command("show the number formats: range, precision, native on what", _formats),
    "launch": _Command("run a subcommand in several processes of this machine", _launch),
}
