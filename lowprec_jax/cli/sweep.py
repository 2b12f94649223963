"""``lowprec_jax sweep``: a config, or several, trained with several seeds; means and their errors.

Each run is a ``train`` of its own in a process of its own, one after the other. Imports no JAX.
Public name: `run_sweep`.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from lowprec_jax.cli.config_file import load_config, resolve_config_path
from lowprec_jax.cli.sweep_results import Group, table, write_results
from lowprec_jax.errors import UserError
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.report_data import read_run
from lowprec_jax.training.resume import changes

__all__ = ["run_sweep"]

_PROG = "lowprec_jax sweep"
_TRAIN = (sys.executable, "-m", "lowprec_jax", "train")
_OPTIONS = {
    "seeds": "seeds, such as 0,1,2",
    "config": "file or name of a config, default quickstart",
    "configs": "several to compare, such as quickstart,quickstart_bf16; the first is the baseline",
    "smoke": "the config 'smoke'",
    "import": "module that registers recipes or formats of your own, for every run",
}


class _Job(NamedTuple):
    """One run: the config as it was named, resolved with its seed, and the words of ``train``."""

    label: str
    config: TrainConfig
    words: list[str]

    @property
    def path(self) -> Path:
        """Directory of the run."""
        return Path(self.config.run_path)

    def __str__(self) -> str:
        return f"{self.label}, seed {self.config.seed}"


def run_sweep(words: Sequence[str]) -> int:
    """Runs ``lowprec_jax sweep WORDS`` and returns the exit code.

    A run that is complete is only read and one that was stopped goes on, so that the same command
    finishes a sweep. Files: ``<run_dir>/seed_<n>/`` of each run, and ``sweep.json`` and
    ``sweep.png`` beside them; for several configs in ``<a>_vs_<b>/`` beside the first run_dir.

    Returns:
      0, or the exit code of the run that ended otherwise: 4 if it was stopped by a signal, which
      is passed on to it, and 128 + the signal that killed it.

    Raises:
      UserError: bad words or a bad config; or a directory holds a run with other options.
    """
    labels, seeds, overrides = _parse(words)
    configs = {label: _load(label, overrides) for label in labels}
    jobs = [_job(label, configs[label], seed, overrides) for seed in seeds for label in labels]
    _require_own_directories(jobs)
    complete = [_is_complete(job) for job in jobs]
    for index, job in enumerate(jobs):
        note = " is complete" if complete[index] else ""
        print(f"[{index + 1}/{len(jobs)}] {job}: {job.path}{note}")
        if not complete[index] and (code := _run(job)):
            return code
    groups = [
        Group(label, seeds, [read_run(job.path) for job in jobs if job.label == label])
        for label in labels
    ]
    print(f"\n{table(groups)}")
    write_results(_directory(list(configs.values())), groups, plots=configs[labels[0]].plots)
    return 0


def _parse(words: Sequence[str]) -> tuple[list[str], list[int], list[str]]:
    """Configs, seeds, and the words that override fields of the configs."""
    parser = argparse.ArgumentParser(
        prog=_PROG, exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--seeds", default="")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--configs", default="")
    parser.add_argument("--smoke", action="store_true")
    try:
        options, overrides = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{_PROG}: {error}. For example: {_PROG} --smoke --seeds 0,1,2") from error
    labels = [*options.config, *filter(None, options.configs.split(","))]
    labels = [*labels, *(["smoke"] * options.smoke)] or ["quickstart"]
    if {"-h", "--help"} & {*overrides}:
        _load(labels[0], ["--help"])
    if any(word.partition("=")[0] == "--seed" for word in overrides):
        raise UserError("A sweep sets --seed itself; give --seeds, such as --seeds 0,1,2.")
    return _once("configs", labels), _seeds(options.seeds), overrides


def _seeds(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(re.fullmatch("[0-9]{1,10}", seed) and int(seed) < 2**32 for seed in seeds):
        raise UserError(
            f"--seeds is {text!r}; allowed: whole numbers from 0 to {2**32 - 1} with commas "
            "between them, such as --seeds 0,1,2."
        )
    return [int(seed) for seed in _once("seeds", [str(int(seed)) for seed in seeds])]


def _once(name: str, given: list[str]) -> list[str]:
    if len({*given}) < len(given):
        raise UserError(f"--{name} {','.join(given)}: one is given twice; keep one.")
    return given


def _load(label: str, overrides: list[str]) -> TrainConfig:
    options = "; ".join(f"--{option}: {text}" for option, text in _OPTIONS.items())
    return load_config(
        TrainConfig,
        resolve_config_path(label),
        overrides,
        prog=_PROG,
        description=f"Trains with several seeds and compares. {options}. The options below "
        f"override the config {label!r}, whose values are shown.",
        extra_options=_OPTIONS,
    )


def _job(label: str, config: TrainConfig, seed: int, overrides: list[str]) -> _Job:
    config = dataclasses.replace(config, seed=seed, run_dir=f"{config.run_path}/seed_{seed}")
    own = ["--seed", str(seed), "--run_dir", config.run_dir]
    return _Job(label, config, ["--config", label, *overrides, *own])


def _require_own_directories(jobs: list[_Job]) -> None:
    owners: dict[Path, _Job] = {}
    for job in jobs:
        other = owners.setdefault(job.path, job)
        if other is not job:
            raise UserError(
                f"{other.label} and {job.label} would both write to {job.path.parent}. Leave out "
                "--name, and put {name} into --run_dir."
            )


def _is_complete(job: _Job) -> bool:
    """Whether the run has nothing left to train.

    Raises:
      UserError: its directory holds a run that cannot be compared with the others.
    """
    try:
        run = read_run(job.path)
    except UserError:
        return False  # there is none, or it did not come far
    found = changes(run.config, job.config)
    other = [*found.decisive, *(text for text in found.said if text.startswith("eval_"))]
    if other:
        raise UserError(
            f"{job.path} holds a run with other options: {'; '.join(other)}. Choose another "
            "--run_dir, or delete it."
        )
    if "validation_loss" not in run.summary:
        return False
    steps = run.summary["steps"]
    return steps == job.config.steps or (job.config.early_stopping > 0 and steps == run.last_step)


def _run(job: _Job) -> int:
    """Trains, says how it ended if not well, and returns the exit code."""
    resume = (job.path / "metrics.jsonl").exists()
    code = _run_child([*_TRAIN, *job.words, "--resume", str(resume)])
    if code:
        from lowprec_jax.training.signals import EXIT_STOPPED  # imports JAX

        how = "was stopped" if code == EXIT_STOPPED else f"ended with exit code {code}"
        print(f"{_PROG}: {job} {how}. The same command goes on from there.", file=sys.stderr)
    return code


def _run_child(command: Sequence[str]) -> int:
    """Runs a command in a session of its own, and passes SIGINT and SIGTERM on to it.

    Returns:
      Its exit code, or 128 + the signal that ended it; 4 if it ended well in spite of a signal.
    """
    received: list[int] = []
    children: list[subprocess.Popen] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True))
        if received:  # before there was anybody to pass it on to
            forward(received[0], None)
        code = children[0].wait()
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and code == 0:
        from lowprec_jax.training.signals import EXIT_STOPPED  # imports JAX

        return EXIT_STOPPED
    return 128 - code if code < 0 else code


def _directory(configs: list[TrainConfig]) -> Path:
    """Where the results of the whole sweep are."""
    first = Path(configs[0].run_path)
    if len(configs) == 1:
        return first
    return first.parent / "_vs_".join(config.name for config in configs)
