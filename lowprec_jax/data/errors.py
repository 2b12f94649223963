"""The error of `lowprec_jax.data`, and the one check that its tokenizers share.

Public: `DataError`. `checked_ids` is for the tokenizers of this package.
"""

import numpy as np
from numpy.typing import ArrayLike

from lowprec_jax.errors import UserError


class DataError(UserError):
    """A corpus, a tokenizer or a batch cannot be made from what was given.

    The message says what failed, what was given, what is allowed and what to do.
    """


def checked_ids(ids: ArrayLike, vocab_size: int) -> np.ndarray:
    """Returns token ids as a flat int64 array, every one inside the vocabulary.

    Args:
      ids: token ids, any shape, integer dtype; may be empty.
      vocab_size: ids must be in ``0 .. vocab_size - 1``.

    Raises:
      DataError: an id is outside the vocabulary, or the ids are not integers.
    """
    array = np.asarray(ids).reshape(-1)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"decode: token ids are {array.dtype}; pass integers.")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise DataError(
            f"decode: token id {int(array[at])} at position {at} is outside the vocabulary of "
            f"{vocab_size} (ids 0 to {vocab_size - 1}). Mask padded logits before sampling, or "
            "load the tokenizer that was saved with this checkpoint."
        )
    return array.astype(np.int64)
