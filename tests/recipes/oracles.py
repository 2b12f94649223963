"""Delayed scaling in plain NumPy float32, from the documented formulas. Imports nothing of ours.

``scale = amax * (1 / format.max) * 2**margin``, kept within [2**-126, 2**126]; an empty history has
scale 1; an amax that is zero, subnormal or not finite is counted and not pushed.
"""

import numpy as np

FORMAT_MAX = {"e4m3fn": 448.0, "e5m2": 57344.0}
SMALLEST_NORMAL = np.float32(2.0**-126)
LARGEST_SCALE = np.float32(2.0**126)


class DelayedScaling:
    """One operand: a ring of amaxes, one push per optimizer step."""

    def __init__(self, fmt, history_length, margin=0, reduction="max"):
        self.reciprocal_of_max = np.float32(1) / np.float32(FORMAT_MAX[fmt])
        self.margin = np.float32(2) ** np.float32(margin)
        self.reduction = reduction
        self.ring = np.zeros(history_length, np.float32)
        self.dropped = 0
        self.age = 0

    def reduced(self):
        """The amax that the scale is made of."""
        return self.ring[0] if self.reduction == "most_recent" else self.ring.max()

    def scale(self):
        amax = self.reduced()
        if amax == 0:
            return np.float32(1)
        scale = np.float32(np.float32(amax * self.reciprocal_of_max) * self.margin)
        return min(max(scale, SMALLEST_NORMAL), LARGEST_SCALE)

    def push(self, amax):
        amax = np.float32(amax)
        before = self.reduced()
        if np.isnan(amax) or np.isinf(amax) or amax < SMALLEST_NORMAL:
            self.dropped += 1
        else:
            self.ring[1:] = self.ring[:-1].copy()
            self.ring[0] = amax
        self.age = 0 if self.reduced() != before else self.age + 1
