"""Byte-level BPE, trained on the corpus by the `tokenizers` package (imported on first use).

Public: `BpeTokenizer`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from lowprec_jax.data.errors import DataError, checked_ids

_CHUNK_CHARACTERS = 1 << 16
_CHUNKS_AT_ONCE = 16  # about 1 MB of text: encodings of a whole corpus would fill the memory
# A lone line end between two printing characters is a token border of the GPT-2 pattern: text
# cut behind it has the same tokens as uncut text.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class BpeTokenizer:
    """Byte-level BPE with the GPT-2 pre-tokenizer: exact round trip of every text.

    Attributes:
      definition: the ``tokenizer.json`` of the `tokenizers` package, as a string.

    Example:
      >>> bpe = BpeTokenizer.train("low lower lowest " * 50, vocab_size=260)
      >>> bpe.decode(bpe.encode("slow ☃"))
      'slow ☃'
    """

    kind: ClassVar[str] = "bpe"
    definition: str = field(repr=False)

    @classmethod
    def train(cls, text: str, *, vocab_size: int) -> Self:
        """Returns the tokenizer learned from `text`; the same text gives the same one.

        Args:
          text: training text; validation text stays out of it.
          vocab_size: 256 bytes plus merges. A short text can end with fewer.

        Raises:
          DataError: `vocab_size` is below 256, or `tokenizers` is not installed.

        Source: byte-level BPE of GPT-2 (Radford et al. 2019, section 2.2), as built by
        `tokenizers.ByteLevelBPETokenizer`.
        """
        if vocab_size < 256:
            raise DataError(
                f"vocab_size {vocab_size} is too small for byte-level BPE: its 256 bytes come "
                "first. Use 256 or more, for example 4096, or the tokenizer 'byte'."
            )
        package = _tokenizers()
        engine = package.Tokenizer(package.models.BPE())
        engine.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        engine.train_from_iterator(_chunks(text), trainer)
        return cls(json.dumps(json.loads(engine.to_str())))  # the form that from_dict restores

    @cached_property
    def _engine(self) -> Any:
        try:
            return _tokenizers().Tokenizer.from_str(self.definition)
        except DataError:
            raise
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"BPE definition of {len(self.definition)} characters cannot be read: {error}. "
                "Load the file that save_tokenizer wrote, or train a new tokenizer."
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of token ids: bytes and merges."""
        return self._engine.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of `text`, int32 [n]."""
        parts, chunks = [np.zeros(0, np.int32)], _chunks(text)
        while group := list(islice(chunks, _CHUNKS_AT_ONCE)):
            encodings = self._engine.encode_batch(group)
            parts.extend(np.asarray(encoding.ids, np.int32) for encoding in encodings)
        return np.concatenate(parts)

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
          DataError: an id is outside the vocabulary.
        """
        return self._engine.decode(checked_ids(ids, self.vocab_size).tolist())

    def to_dict(self) -> dict[str, Any]:
        """Returns the tokenizer as plain JSON data."""
        return {"kind": self.kind, "definition": json.loads(self.definition)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Returns the tokenizer that `to_dict` described, after reading its definition once.

        Raises:
          DataError: the definition cannot be read, or `tokenizers` is not installed.
        """
        tokenizer = cls(json.dumps(data["definition"]))
        _ = tokenizer._engine
        return tokenizer


def _chunks(text: str) -> Iterator[str]:
    """Yields the text in pieces of about 64k characters, cut where no token is."""
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _CHUNK_CHARACTERS)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "The tokenizer 'bpe' needs the package tokenizers, which is not installed. Run "
            "`pip install tokenizers`, or use the tokenizer 'byte' or 'char'."
        ) from error
    return tokenizers
