"""Whether a loss is a spike, by a rule that no bad loss can poison. Imports no JAX.

Public name: `SpikeRule`.
"""

import collections
import math
import statistics
from collections.abc import Iterable

__all__ = ["SpikeRule"]

# Spacing of bf16 values, the coarsest that a loss is computed in, relative to their size: a
# smaller spread of the losses is not believed.
RESOLUTION = 2.0**-8
# Standard deviation over median absolute deviation, for Gaussian numbers.
GAUSSIAN = 1.4826


class SpikeRule:
    """A loss is a spike above ``median + sigma * deviation`` of the last sound losses.

    The rule of OLMo and MaxText (6 sigma over 128 losses, 64 at least), with three differences.
    Only losses that passed it enter, so that neither a spike nor a NaN moves the limit; theirs
    enters whatever came, and one NaN blinds it for a whole window. Centre and deviation are the
    median and 1.4826 times the median absolute deviation, which is sigma for Gaussian losses: with
    mean and standard deviation the fall of the loss at the start of a run blinds the rule for a
    window. And the deviation is taken to be `RESOLUTION` of the median at least, and of 1 nat, so
    that a constant loss does not alarm: with 6 sigma, a rise of less than 6 / 256 = 2.3 % is no
    spike, nor is one of 0.023 nats, which is 2.4 % of the perplexity whatever the loss.

    It is computed anew from the window for each limit, so that a resumed run is bit-equal.

    Args:
      sigma: see above.
      window: losses that are kept, the newest.
      min_window: below this number of losses nothing that is finite is a spike.
    """

    def __init__(self, sigma: float, window: int, min_window: int):
        self._sigma, self._min_window = sigma, min_window
        self._losses: collections.deque[float] = collections.deque(maxlen=window)

    @property
    def losses(self) -> list[float]:
        """The sound losses that the next one is measured against, oldest first."""
        return list(self._losses)

    def limit(self) -> float | None:
        """The highest loss that is not a spike; None while too few losses are known."""
        count = len(self._losses)
        if count < self._min_window:
            return None
        centre = statistics.median(self._losses)
        spread = statistics.median(abs(x - centre) for x in self._losses)
        return centre + self._sigma * max(GAUSSIAN * spread, RESOLUTION * max(abs(centre), 1.0))

    def extend(self, losses: Iterable[float]) -> None:
        """Takes sound losses, oldest first.

        Raises:
          ValueError: one of them is not finite; all after it would be compared with NaN.
        """
        for loss in losses:
            if not math.isfinite(loss):
                raise ValueError(f"SpikeRule.extend: loss {loss} is not finite, so not sound.")
            self._losses.append(loss)
