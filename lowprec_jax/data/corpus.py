"""Text corpora with a fixed training/validation split and a data card.

A corpus is the source of the running interpreter's standard library (``"stdlib"``: real code,
always present, nothing to download), one text file, or a folder of text files. Imports nothing
outside the Python standard library.

Public: `Corpus`, `load_corpus`, `held_out`.
"""

import hashlib
import math
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowprec_jax.data.errors import DataError

_SPLIT_BY_FILE_FROM = 10
_NOT_LIBRARY_CODE = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_OUT_OF_DISTRIBUTION = "pydoc_data/topics.py"
_PSF_NOTE = (
    "Python Software Foundation License version 2 (PSF-2.0); some modules carry further "
    "notices, see https://docs.python.org/3/license.html. Read from the running interpreter, "
    "not redistributed."
)


@dataclass(frozen=True)
class Corpus:
    """Text of both splits and the card that says where it came from.

    Attributes:
      name: ``"stdlib"``, or the name of the file or folder.
      train: text to train on, never empty.
      validation: text that is never trained on, never empty.
      card: plain JSON: source, split rule, files, characters, bytes and sha256 per split.
    """

    name: str
    train: str = field(repr=False)
    validation: str = field(repr=False)
    card: dict[str, Any] = field(repr=False)


def load_corpus(source: str, *, validation_fraction: float = 0.1) -> Corpus:
    """Returns the text of a corpus, split into training and validation text.

    ``"stdlib"`` and folders of 10 or more files are split by file (`held_out`), so that no part
    of a validation file is trained on. A single file and smaller folders are split by
    characters: of each file, the first ``int((1 - validation_fraction) * n)`` are training text.
    Text is kept exactly as stored (line ends included); a line end is added only between two
    files where the first has none. Empty files, hidden files and ``__pycache__`` are passed over.

    Args:
      source: ``"stdlib"``, or a path to a UTF-8 text file or to a folder of such files, read
        recursively in sorted order. A folder that is called stdlib is ``"./stdlib"``.
      validation_fraction: share of files or characters held out, inside (0, 1).

    Raises:
      DataError: nothing is at the path, it holds no text, a file is not UTF-8,
        `validation_fraction` is outside (0, 1), or one of the splits comes out empty.

    Example:
      >>> corpus = load_corpus("stdlib")
      >>> corpus.name, len(corpus.train) > len(corpus.validation) > 0
      ('stdlib', True)

    Source: the character rule is that of nanoGPT, data/shakespeare_char/prepare.py.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(
            f"validation_fraction {validation_fraction} is outside (0, 1). Use for example 0.1."
        )
    if source == "stdlib":
        return _load_stdlib(validation_fraction)
    path = Path(source).expanduser()
    if path.is_file():
        texts = {path.name: _read_utf8(path)}
    elif path.is_dir():
        texts = {name: _read_utf8(path / name) for name in _walk(path)}
    else:
        raise DataError(
            f"No text at '{source}': it is neither a file nor a folder. Pass 'stdlib', or the "
            "path of a text file or of a folder of text files."
        )
    note = {"licence": "not known: text supplied by the user"}
    return _make_corpus(path.resolve().name, source, texts, validation_fraction, note)


def held_out(relative_path: str, validation_fraction: float) -> bool:
    """Returns whether the file belongs to validation; depends on nothing but its path.

    True where ``sha256(relative_path)``, read as a number in [0, 1), is below
    `validation_fraction`: adding or removing files never moves another one.

    Args:
      relative_path: path below the corpus folder, with forward slashes.
      validation_fraction: share of files to hold out, inside (0, 1).

    Example:
      >>> held_out("json/decoder.py", 0.1), held_out("json/decoder.py", 0.99)
      (False, True)
    """
    return _path_hash(relative_path) < validation_fraction


def _path_hash(relative_path: str) -> float:
    """Returns 53 bits of the sha256 of the path as an exact float in [0, 1)."""
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _load_stdlib(validation_fraction: float) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, skipped = {}, []
    for name in _walk(root):
        if not _is_library_code(name):
            continue
        try:
            texts[name] = _read_utf8(root / name)
        except DataError:
            skipped.append(name)
    notes = {
        "licence": _PSF_NOTE,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "left_out": ["tests", _OUT_OF_DISTRIBUTION, "files generated on the building machine"],
        "not_utf8": skipped,
    }
    return _make_corpus("stdlib", "stdlib", texts, validation_fraction, notes)


def _is_library_code(name: str) -> bool:
    """Returns whether a path below the stdlib is code that every machine has alike.

    Out: tests, installed packages, the out-of-distribution text, and what differs between two
    machines with the same Python (build settings, a site's own start-up file).
    """
    *folders, file = name.split("/")
    local = file.startswith("_sysconfigdata") or file in ("sitecustomize.py", "usercustomize.py")
    local = local or any(folder.startswith("config-") for folder in folders)
    out = local or name == _OUT_OF_DISTRIBUTION or not _NOT_LIBRARY_CODE.isdisjoint(folders)
    return file.endswith(".py") and not out


def _walk(root: Path) -> list[str]:
    """Returns the sorted relative paths of the visible files below `root`."""

    def fail(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise error

    def visible() -> Iterator[str]:
        for folder, subfolders, files in os.walk(root, onerror=fail):
            subfolders[:] = [s for s in subfolders if s[0] != "." and s != "__pycache__"]
            for file in files:
                path = Path(folder, file)
                if file[0] != "." and path.is_file():
                    yield path.relative_to(root).as_posix()

    return sorted(visible())


def _read_utf8(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
            f"{error.start}. Convert it to UTF-8 (iconv -t UTF-8) or move it out of the corpus."
        ) from error


def _make_corpus(
    name: str, source: str, texts: Mapping[str, str], fraction: float, notes: Mapping[str, Any]
) -> Corpus:
    texts = {path: text for path, text in texts.items() if text}
    if not texts:
        raise DataError(
            f"'{source}' holds no text: no file with at least one character was found. Pass a "
            "file or folder with UTF-8 text (hidden files are passed over), or 'stdlib'."
        )
    if len(texts) >= _SPLIT_BY_FILE_FROM:
        rule = "by file: sha256 of the relative path, as a number in [0, 1), below the fraction"
        validation = [text for path, text in texts.items() if held_out(path, fraction)]
        train = [text for path, text in texts.items() if not held_out(path, fraction)]
    else:
        rule = "by characters: first int((1 - fraction) * n) of each file are training text"
        cuts = {path: int((1 - fraction) * len(text)) for path, text in texts.items()}
        train = [texts[path][:cut] for path, cut in cuts.items() if cut > 0]
        validation = [texts[path][cut:] for path, cut in cuts.items() if cut < len(texts[path])]
    if not train or not validation:
        raise DataError(_empty_split(source, texts, fraction, "validation" if train else "train"))
    splits = {"train": _join(train), "validation": _join(validation)}
    card = {
        "name": name,
        "source": source,
        "files": len(texts),
        "split": {"rule": rule, "validation_fraction": fraction},
        "train": {"files": len(train), **_measure(splits["train"])},
        "validation": {"files": len(validation), **_measure(splits["validation"])},
        **notes,
    }
    return Corpus(name=name, card=card, **splits)


def _empty_split(source: str, texts: Mapping[str, str], fraction: float, split: str) -> str:
    """Returns the message for a split without text, with a fraction that gives it some."""
    if len(texts) >= _SPLIT_BY_FILE_FROM:
        hashes = [_path_hash(path) for path in texts]
        given = f"{len(texts)} files, split by the hash of their paths"
        above, below = math.ceil(min(hashes) * 1e4) / 1e4, math.floor(max(hashes) * 1e4) / 1e4
        bound = f"{above:.4f} or more" if split == "validation" else f"{below:.4f} or less"
        remedy = f"Use a validation_fraction of {bound}, or join the files into one"
    else:
        given = f"{len(texts)} files, the longest of {max(map(len, texts.values()))} characters"
        remedy = "Use a longer text, or a validation_fraction nearer 0.5"
    return (
        f"The {split} split of '{source}' is empty with validation_fraction {fraction} ({given}). "
        f"{remedy}."
    )


def _join(texts: Iterable[str]) -> str:
    """Returns the texts one after another, with a line end between two that lack one."""
    *head, last = texts
    return "".join([*(t if t.endswith("\n") else t + "\n" for t in head), last])


def _measure(text: str) -> dict[str, Any]:
    data = text.encode("utf-8")
    digest = hashlib.sha256(data).hexdigest()
    return {"characters": len(text), "bytes": len(data), "sha256": digest}
