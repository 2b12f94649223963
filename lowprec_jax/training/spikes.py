"""Whether a loss is a spike, by a rule that no bad loss can poison. Imports no JAX.

Public name: `SpikeRule`.
"""

import collections
import math
from collections.abc import Iterable

__all__ = ["SpikeRule"]

# Spacing of bf16 values, the coarsest that a loss is computed in, relative to their size: a
# smaller spread of the losses is not believed.
RESOLUTION = 2.0**-8


class SpikeRule:
    """A loss is a spike above ``mean + sigma * std`` of the last sound losses.

    The rule of OLMo and MaxText (6 sigma over 128 losses, 64 at least), with two differences. Only
    losses that passed it enter, so that neither a spike nor a NaN moves the limit; theirs enters
    whatever came, and one NaN blinds it for a whole window. And the deviation is taken to be
    `RESOLUTION` of the mean at least, and of 1 nat, so that a constant loss does not alarm: with
    6 sigma, a rise of less than 6 / 256 = 2.3 % is no spike, nor is one of 0.023 nats, which is
    2.4 % of the perplexity whatever the loss.

    The sample deviation (n - 1) of a window is computed anew for each limit: sums that are carried
    along would drift, and a resumed run would not be bit-equal.

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
        mean = math.fsum(self._losses) / count
        variance = math.fsum((x - mean) ** 2 for x in self._losses) / (count - 1)
        return mean + self._sigma * max(math.sqrt(variance), RESOLUTION * max(abs(mean), 1.0))

    def extend(self, losses: Iterable[float]) -> None:
        """Takes sound losses, oldest first.

        Raises:
          ValueError: one of them is not finite; all after it would be compared with NaN.
        """
        for loss in losses:
            if not math.isfinite(loss):
                raise ValueError(f"SpikeRule.extend: loss {loss} is not finite, so not sound.")
            self._losses.append(loss)
