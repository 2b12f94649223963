"""Time of one matrix product on a chip: the longer of its arithmetic and its memory traffic.

Source: the roofline model, Williams et al. 2009, doi:10.1145/1498765.1498785.

Public names: `Shape`, `Rates`, `Cost`, `gemm_cost`, `traffic_cost`.
"""

import math
from typing import NamedTuple, Self

from lowprec_jax.roofline.chips import Chip

__all__ = ["Cost", "Rates", "Shape", "gemm_cost", "traffic_cost"]


class Shape(NamedTuple):
    """``[m, k] x [k, n] -> [m, n]``."""

    m: int
    k: int
    n: int


class Rates(NamedTuple):
    """A chip, and what it attains of its peaks.

    Attributes:
      chip: the chip.
      compute: attained share of the peak of products, in (0, 1].
      memory: attained share of the peak memory bandwidth, in (0, 1].
    """

    chip: Chip
    compute: float = 0.7
    memory: float = 0.8

    def flops(self, bits: int, *, integer: bool = False) -> float:
        """Attained FLOP/s of products of codes of this width; NaN where no peak is known."""
        return self.compute * self.chip.rate(bits, integer=integer)

    @property
    def bytes(self) -> float:
        """Attained memory bandwidth, bytes/s; NaN where no peak is known."""
        return self.memory * 1e9 * self.chip.bandwidth


class Cost(NamedTuple):
    """Work and time; costs add up.

    Attributes:
      flops: floating-point operations, 2 for a multiply-add.
      bytes: bytes between the memory and the chip.
      seconds: time; NaN where the rates are not known.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: tuple) -> Self:
        return type(self)(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Self:
        """The cost of doing it several times."""
        return type(self)(*(count * x for x in self))

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.bytes if self.bytes else math.inf


def gemm_cost(
    shape: Shape,
    left_bytes: float,
    right_bytes: float,
    out_bytes: float,
    flops: float,
    bytes: float,
) -> Cost:
    """A product that reads each operand once and writes its result once.

    Args:
      shape: its sizes.
      left_bytes: bytes of an element of the left operand; 0.5 for 4-bit codes.
      right_bytes: the same of the right operand.
      out_bytes: the same of the result.
      flops: attained FLOP/s.
      bytes: attained bytes/s.
    """
    m, k, n = shape
    work = 2.0 * m * k * n
    moved = m * k * left_bytes + k * n * right_bytes + m * n * out_bytes
    compute, memory = work / flops, moved / bytes
    return Cost(
        work, moved, compute + memory if _unknown(compute, memory) else max(compute, memory)
    )


def traffic_cost(moved: float, bytes: float) -> Cost:
    """Arithmetic that hides behind its memory traffic, such as a cast.

    Args:
      moved: bytes read and written.
      bytes: attained bytes/s.
    """
    return Cost(0.0, moved, moved / bytes)


def _unknown(*seconds: float) -> bool:
    return any(map(math.isnan, seconds))
