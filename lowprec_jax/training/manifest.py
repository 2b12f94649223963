"""The manifest of a checkpoint: what it holds, and a digest of every file.

It is written last, in one move: a folder with a manifest is a checkpoint, one without is what a
kill left. Plain JSON. Public names: `Manifest`, `ArrayRecord`, `DamagedError`, `FORMAT_VERSION`.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["FORMAT_VERSION", "ArrayRecord", "DamagedError", "Manifest"]

FORMAT_VERSION = 4
NAME = "manifest.json"


class DamagedError(Exception):
    """A checkpoint that is not what was written; the text names the file and what is wrong."""


class ArrayRecord(NamedTuple):
    """Of one array: ``"float32[3, 4]"``, and its `fingerprint`."""

    kind: str
    fingerprint: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      step: completed optimizer steps.
      about: what else is needed to go on, plain JSON: config, position in the data, guard.
      validation_loss: the newest, if it was measured at this step.
      arrays: every array of the state by path.
      files: SHA-256 of every file, by path from the folder of the checkpoint.
      format_version: of the whole layout.
    """

    step: int
    about: dict[str, Any]
    validation_loss: float | None
    arrays: dict[str, ArrayRecord]
    files: dict[str, str]
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Writes the manifest, whole or not at all, and waits until it is on the disk."""
        body = json.dumps(dataclasses.asdict(self), allow_nan=False)
        text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body})
        temporary = folder / f".{NAME}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / NAME)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads the manifest of a checkpoint.

        Raises:
          DamagedError: it is not what was written.
        """
        path = folder / NAME
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            body = stored["body"]
            if hashlib.sha256(body.encode()).hexdigest() != stored["sha256"]:
                raise ValueError("its SHA-256 is another")
            fields = json.loads(body)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} cannot be used: {error or type(error).__name__}") from None
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise DamagedError(
                f"{path} has format {version}, this version of lowprec_jax reads {FORMAT_VERSION}; "
                "resume with the version that wrote it (see environment.json of the run)"
            )
        fields["arrays"] = {k: ArrayRecord(*v) for k, v in fields["arrays"].items()}
        return cls(**fields)

    def check_files(self, folder: Path) -> None:
        """Compares every file with its digest.

        Raises:
          DamagedError: a file is missing, was changed, or is not of this checkpoint.
        """
        found = digests(folder)
        for name in sorted({*self.files, *found}):
            if name not in found:
                raise DamagedError(f"{folder / name} is missing")
            if name not in self.files:
                raise DamagedError(f"{folder / name} does not belong to it")
            if found[name] != self.files[name]:
                raise DamagedError(f"{folder / name} was changed: its SHA-256 is another")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the manifest, by path from its folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in paths
        if path.name not in (NAME, f".{NAME}.tmp")
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
