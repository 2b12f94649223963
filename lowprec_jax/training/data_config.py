"""What a run trains on. Imports no JAX. Public name: `DataConfig`."""

import dataclasses
from typing import Literal

from lowprec_jax.training.config_checks import require, require_at_least, require_between


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model is trained on."""

    source: str = "stdlib"
    """"stdlib" (the Python standard library's own source) or the path of a file or folder."""
    tokenizer: Literal["byte", "char", "bpe"] = "byte"
    """Bytes, the characters of the training text, or byte pairs trained on it."""
    vocab_size: int = 1024
    """Tokens of the bpe tokenizer; the others find their own size."""
    validation_fraction: float = 0.1
    """Part of the text that is never trained on."""

    def __post_init__(self) -> None:
        require(self.source != "", "source is empty; give 'stdlib' or a path.")
        require_at_least("vocab_size", self.vocab_size, 1)
        require(
            self.tokenizer != "bpe" or self.vocab_size > 256,
            f"vocab_size {self.vocab_size} is too small for bpe, which starts from 256 bytes. "
            f"Use 257 or more.",
        )
        require_between("validation_fraction", self.validation_fraction, 0, 1, open_low=True)
