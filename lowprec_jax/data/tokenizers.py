"""Tokenizers with an exact round trip: bytes, characters, and (in `bpe`) trained byte-level BPE.

A tokenizer is saved as JSON beside the checkpoint that was trained with it.

Public: `Tokenizer`, `ByteTokenizer`, `CharTokenizer`, `build_tokenizer`, `save_tokenizer`,
`load_tokenizer`.
"""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from lowprec_jax.data.bpe import BpeTokenizer
from lowprec_jax.data.corpus import Corpus
from lowprec_jax.data.errors import DataError, checked_ids


class Tokenizer(Protocol):
    """What turns text into token ids and back: ``decode(encode(text)) == text``.

    `encode` returns int32 [n] with ids in ``0 .. vocab_size - 1``. `decode` takes integer ids of
    any shape, read in row order; bytes that are not UTF-8 become U+FFFD, an id outside the
    vocabulary is a `DataError`. ``from_dict(to_dict())`` gives an equal tokenizer.
    """

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    def encode(self, text: str) -> np.ndarray: ...  # noqa: D102

    def decode(self, ids: ArrayLike) -> str: ...  # noqa: D102

    def to_dict(self) -> dict[str, Any]: ...  # noqa: D102

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self: ...  # noqa: D102


@dataclass(frozen=True)
class ByteTokenizer:
    """Every UTF-8 byte is a token: 256 ids, no training, any text.

    Example:
      >>> ByteTokenizer().encode("aé").tolist()
      [97, 195, 169]
    """

    kind: ClassVar[str] = "byte"

    @property
    def vocab_size(self) -> int:
        """Number of token ids, 256."""
        return 256

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of `text`, int32 [bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of the bytes `ids`; what is not UTF-8 becomes U+FFFD."""
        data = checked_ids(ids, 256).astype(np.uint8).tobytes()
        return data.decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Returns the tokenizer as plain JSON data."""
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Returns the tokenizer that `to_dict` described."""
        del data
        return cls()


@dataclass(frozen=True)
class CharTokenizer:
    """Every character of a fixed set is a token, numbered by code point.

    Attributes:
      characters: the set, sorted, each once. ``CharTokenizer.from_text`` collects it.

    Example:
      >>> CharTokenizer.from_text("hello").encode("hole").tolist()
      [1, 3, 2, 0]

    Source: nanoGPT, data/shakespeare_char/prepare.py (same ids for the same text).
    """

    kind: ClassVar[str] = "char"
    characters: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.characters or list(self.characters) != sorted(set(self.characters)):
            raise DataError(
                f"CharTokenizer: characters (given: {len(self.characters)}) must be at least one, "
                "sorted and distinct. Use CharTokenizer.from_text(text)."
            )

    @classmethod
    def from_text(cls, *texts: str) -> Self:
        """Returns the tokenizer of all characters that occur in `texts`."""
        return cls("".join(sorted(set().union(*texts))))

    @property
    def vocab_size(self) -> int:
        """Number of token ids: distinct characters."""
        return len(self.characters)

    @cached_property
    def _id_of_code(self) -> np.ndarray:
        """Returns the token id of each code point, int32; -1 where unknown, as at the end."""
        codes = _code_points(self.characters)
        table = np.full(int(codes.max()) + 2, -1, np.int32)
        table[codes] = np.arange(codes.size, dtype=np.int32)
        return table

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of `text`, int32 [characters].

        Raises:
          DataError: a character is not in the set; the message names it.
        """
        table, codes = self._id_of_code, _code_points(text)
        ids = table[np.minimum(codes, table.size - 1)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            at = int(unknown[0])
            raise DataError(
                f"Character {text[at]!r} (U+{int(codes[at]):04X}) at position {at} is not among "
                f"the {self.vocab_size} characters of this tokenizer ({unknown.size} such "
                "positions). Leave it out of the text, or use the tokenizer 'byte' or 'bpe'."
            )
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids`; an id outside the set is a `DataError`."""
        codes = _code_points(self.characters)[checked_ids(ids, self.vocab_size)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """Returns the tokenizer as plain JSON data."""
        return {"kind": self.kind, "characters": self.characters}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Returns the tokenizer that `to_dict` described."""
        return cls(data["characters"])


def build_tokenizer(kind: str, corpus: Corpus, *, vocab_size: int = 4096) -> Tokenizer:
    """Returns a tokenizer for `corpus`.

    Args:
      kind: ``"byte"``; ``"char"``: the characters of both splits, so that validation text can
        be encoded; ``"bpe"``: trained on the training split alone.
      corpus: the text.
      vocab_size: for ``"bpe"`` only, at least 256; the others take theirs from the text.

    Raises:
      DataError: unknown `kind`, `vocab_size` too small, or `tokenizers` not installed.
    """
    tokenizer = _tokenizer_class(kind)
    if tokenizer is CharTokenizer:
        return CharTokenizer.from_text(corpus.train, corpus.validation)
    if tokenizer is BpeTokenizer:
        return BpeTokenizer.train(corpus.train, vocab_size=vocab_size)
    return ByteTokenizer()


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Writes the tokenizer to `path` as JSON; the file is complete or not there."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
    partial.replace(target)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer that `save_tokenizer` wrote.

    Raises:
      DataError: no such file, or it does not hold a tokenizer.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return _tokenizer_class(data["kind"]).from_dict(data)
    except DataError as error:
        raise DataError(f"Tokenizer file '{path}': {error}") from error
    except OSError as error:
        raise DataError(
            f"Tokenizer file '{path}' cannot be read: {error.strerror}. Pass the file that "
            "save_tokenizer wrote beside the checkpoint."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{path}' is not a tokenizer file ({type(error).__name__}: {error}). Pass the file "
            "that save_tokenizer wrote beside the checkpoint."
        ) from error


def _tokenizer_class(kind: str) -> type[Tokenizer]:
    classes = (ByteTokenizer, CharTokenizer, BpeTokenizer)
    for tokenizer in classes:
        if tokenizer.kind == kind:
            return tokenizer
    known = [tokenizer.kind for tokenizer in classes]
    nearest = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.4)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    raise DataError(f"Unknown tokenizer '{kind}'. Known: {', '.join(known)}.{hint}")


def _code_points(text: str) -> np.ndarray:
    """Returns the code points of `text`, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
