"""Studies: folders of training runs that can be compared, and that stay when a study is cut off."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import RAISED_THRESHOLDS, write_json

# The runs write no files that a study does not read, and evaluate once, at the end.
_QUIET = (
    *("--plots", "False"),
    *("--progress", "False"),
    *("--sample_tokens", "0"),
    *("--eval_every", "0"),
    *("--checkpoint_every", "0"),
    *("--log_every", "200"),
)


def open_study(out: Path, config: str, source: str, overrides: Sequence[str]) -> None:
    """Makes the folder of a study, or checks that it holds runs of the same text and options.

    Raises:
      ValueError: there is no text, or the folder holds other runs.
    """
    text = Path(source)
    if not text.is_file():
        raise ValueError(f"no text at {source!r}; give the file to train on with --source.")
    settings = {
        "config": config,
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "overrides": list(overrides),
    }
    record = out / "study.json"
    if not record.exists():
        write_json(record, settings)
        return
    earlier = json.loads(record.read_text(encoding="utf-8"))
    different = [key for key in settings if earlier.get(key) != settings[key]]
    if different:
        given = "; ".join(
            f"{key} {earlier.get(key)} there, {settings[key]} now" for key in different
        )
        raise ValueError(f"{out} holds other runs ({given}). Choose another --out.")


def is_finished(path: Path) -> bool:
    """Whether the run in a folder came to its end."""
    return (path / "summary.json").exists()


def train(path: Path, config: str, source: str, overrides: Sequence[str]) -> None:
    """Trains one run from its start; what a killed run left is removed.

    Raises:
      subprocess.CalledProcessError: the run failed.
    """
    shutil.rmtree(path, ignore_errors=True)
    print(f"training {path.name}", flush=True)
    command = [sys.executable, "-m", "lowprec_jax", "train", "--config", config, *_QUIET]
    command += ["--data.source", source, *overrides, "--name", path.name, "--run_dir", str(path)]
    subprocess.run(command, env={**os.environ, **RAISED_THRESHOLDS}, check=True)
    write_json(path / "code.json", {"sha256": _code_hash()})
    shutil.rmtree(path / "checkpoints", ignore_errors=True)


def _code_hash() -> str:
    """Identifies the code of a run: names and contents of the package's files."""
    spec = importlib.util.find_spec("lowprec_jax")
    root = Path(spec.submodule_search_locations[0])
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
