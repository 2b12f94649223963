"""The files of a run: config, environment, metrics, plots, samples, checkpoints."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lowprec_jax.errors import UserError


class RunDirectory:
    """Paths and small files of a run.

    ``config.yaml``       the resolved config
    ``environment.json``  versions, machine, devices
    ``data_card.json``    what the model was trained on
    ``tokenizer.json``    the tokenizer
    ``metrics.jsonl``     one JSON object a line: every step and every evaluation
    ``events.jsonl``      what happened: skips, rollbacks, switches of precision, checkpoints
    ``tensorboard/``      the same for TensorBoard, if tensorboardX is installed
    ``checkpoints/``      see `Checkpoints`
    ``report.html``, ``*.png``, ``samples.txt``, ``summary.json``  written at the end

    Args:
      path: the directory.
      resume: go on with the run that is there.
      writes: if not, as in all processes of a run but the first, nothing is checked or written.

    Raises:
      UserError: a finished or stopped run is there and `resume` is not asked for, or the reverse.
    """

    def __init__(self, path: str, *, resume: bool, writes: bool = True):
        self.path, self.writes = Path(path), writes
        if not writes:
            return
        try:
            begun = self.metrics.exists()
        except OSError as error:
            raise UserError(f"{path!r} cannot be a run directory: {error}.") from None
        if begun and not resume:
            raise UserError(
                f"{self.path} holds a run already. Add --resume True to go on with it, or choose "
                f"another --run_dir or --name; nothing was changed."
            )
        if resume and not begun:
            raise UserError(
                f"{self.path} holds no run to resume. Check --run_dir and --name, or start without "
                "--resume."
            )

    def make(self) -> None:
        """Makes the directory; from here on files are written.

        Raises:
          UserError: it cannot be made.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the run directory {self.path}: {error}.") from None

    @property
    def metrics(self) -> Path:
        """The metrics log."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """The log of events."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, whole or not at all."""
        if not self.writes:
            return
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    devices = jax.devices()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [str(device) for device in devices],
        "device_kind": devices[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {
            name: version(name)
            for name in ("lowprec-jax", "jax", "jaxlib", "flax", "optax", "ml_dtypes", "numpy")
        },
    }
