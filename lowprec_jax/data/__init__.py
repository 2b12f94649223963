"""Real text for training: corpora with a fixed split, exact tokenizers, seekable batches.

NumPy and the standard library only; the BPE tokenizer imports `tokenizers` when it is used.
"""

from lowprec_jax.data.batches import Batches, validation_windows
from lowprec_jax.data.bpe import BpeTokenizer
from lowprec_jax.data.corpus import Corpus, held_out, load_corpus
from lowprec_jax.data.errors import DataError
from lowprec_jax.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

__all__ = [
    "Batches",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "DataError",
    "Tokenizer",
    "build_tokenizer",
    "held_out",
    "load_corpus",
    "load_tokenizer",
    "save_tokenizer",
    "validation_windows",
]
