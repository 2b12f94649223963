"""Batches as a pure function of (seed, step), and validation text in order.

Public: `Batches`, `validation_windows`.
"""

from dataclasses import dataclass, field
from typing import cast

import numpy as np

from lowprec_jax.data.errors import DataError


@dataclass(frozen=True, eq=False)
class Batches:
    """Random windows of a token sequence; ``batch(step)`` depends on seed and step alone.

    Nothing is carried from step to step: any step is reached in the same time, a resumed run
    sees the batches it would have seen, and every host computes the same global batch, whatever
    the number of devices. Windows start at uniformly drawn positions, with replacement.

    Attributes:
      tokens: integer [n], n > context, each in 0 .. 2**31 - 1. Kept read-only: uint8 and uint16
        (memory-mapped files too) as given, other dtypes in the smallest of uint8, uint16 and
        int32 that holds the largest token.
      batch_size: windows per batch, the global batch, >= 1.
      context: inputs per window, >= 1.
      seed: 0 .. 2**64 - 1.

    Raises:
      DataError: a value is outside the range above.

    Example:
      >>> inputs, targets = Batches(np.arange(100), batch_size=2, context=4, seed=0).batch(7)
      >>> bool((targets == inputs + 1).all()), inputs.shape
      (True, (2, 4))

    Source: uniform windows as in nanoGPT, train.py, `get_batch`. The positions are raw Philox
    words (Salmon et al. 2011) modulo the number of positions, not `Generator.integers`, whose
    stream NumPy may change (NEP 19); the bias is below n / 2**64.
    """

    tokens: np.ndarray = field(repr=False)
    batch_size: int
    context: int
    seed: int

    def __post_init__(self) -> None:
        _require("batch_size", self.batch_size, 1)
        _require("seed", self.seed, 0, 2**64 - 1)
        object.__setattr__(self, "tokens", _compact(_checked_tokens(self.tokens, self.context)))

    def batch(self, step: int, rows: slice | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the inputs and targets of `step`, both int32 [number of rows, context].

        ``targets[i, j]`` is the token that follows ``inputs[i, j]`` in the sequence.

        Args:
          step: 0 .. 2**64 - 1.
          rows: windows of the global batch to return, such as those of one host; the others are
            not read. Its ends may be None, as in the slices that `jax.make_array_from_callback`
            asks for. None: all.

        Raises:
          DataError: `step` is outside its range, or `rows` reaches outside the batch.
        """
        _require("step", step, 0, 2**64 - 1)
        rows = self._checked_rows(rows)
        # The step is the third of four counter words: streams of two steps are 2**128 apart.
        words = np.array([0, 0, step, 0], np.uint64)
        key = np.array([self.seed, 0], np.uint64)
        # random_raw is typed for its scalar form; with a size it returns uint64 [size].
        raw = cast(np.ndarray, np.random.Philox(key=key, counter=words).random_raw(self.batch_size))
        starts = (raw % np.uint64(self.tokens.size - self.context)).astype(np.int64)
        starts = starts[rows]
        windows = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int32)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def _checked_rows(self, rows: slice | None) -> slice:
        """NumPy would cut a slice off at the end of the batch, and count negative ends from it."""
        if rows is None:
            return slice(None)
        start = 0 if rows.start is None else rows.start
        stop = self.batch_size if rows.stop is None else rows.stop
        if not 0 <= start <= stop <= self.batch_size or rows.step not in (None, 1):
            raise DataError(
                f"rows is {rows}; allowed: slice(start, stop) with 0 <= start <= stop <= "
                f"batch_size {self.batch_size}."
            )
        return slice(start, stop)


def validation_windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the whole split as windows that do not overlap, in order: nothing is sampled.

    Row i holds inputs ``tokens[i*context : (i+1)*context]`` and the tokens that follow them, so
    that every token but the first is a target exactly once; the ``(len - 1) % context`` tokens
    at the end that fill no window are left out.

    Args:
      tokens: integer [len], len > context.
      context: inputs per window, >= 1.

    Returns:
      Inputs and targets, both int32 [n, context] with ``n = (len - 1) // context``.

    Raises:
      DataError: the split is shorter than one window, or `tokens` is not 1-D and integer.

    Example:
      >>> validation_windows(np.arange(6), 2)[1].tolist()
      [[1, 2], [3, 4]]
    """
    tokens = _checked_tokens(tokens, context)
    n = (tokens.size - 1) // context
    inputs = tokens[: n * context].astype(np.int32).reshape(n, context)
    targets = tokens[1 : n * context + 1].astype(np.int32).reshape(n, context)
    return inputs, targets


def _checked_tokens(tokens: np.ndarray, context: int) -> np.ndarray:
    _require("context", context, 1)
    tokens = np.asanyarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(
            f"tokens is {tokens.dtype} of shape {tokens.shape}; pass a 1-D integer array, as "
            "`Tokenizer.encode` returns."
        )
    if tokens.size <= context:
        raise DataError(
            f"context {context} needs at least {context + 1} tokens, the corpus has "
            f"{tokens.size}. Use a context of {max(tokens.size - 1, 1)} or less, or a longer text."
        )
    return tokens


def _compact(tokens: np.ndarray) -> np.ndarray:
    """Returns a read-only array of the same tokens in the smallest of the three dtypes."""
    if tokens.dtype not in (np.uint8, np.uint16):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= 2**31:
            raise DataError(f"tokens are {low} to {high}; ids must be in 0 to {2**31 - 1}.")
        dtype = np.uint8 if high < 2**8 else np.uint16 if high < 2**16 else np.int32
        tokens = tokens.astype(dtype)
    tokens = tokens.view()
    tokens.flags.writeable = False
    return tokens


def _require(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise DataError(f"{name} is {value}; it must be {allowed}.")
