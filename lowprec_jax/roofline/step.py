"""A training step on N chips: time, memory, and how much of the communication shows.

    compute   products and casts of the layers, attention, traffic of what the backward pass keeps
              (written once, read once), traffic of the optimizer; one after the other
    hidden    messages that a compiler can run beside products: kernels and gradients of FSDP
    exposed   all other messages, and what is left of the hidden ones beyond the compute time

    step = compute + exposed

Public names: `ChipWork`, `Compute`, `compute_time`, `StepTime`, `step_time`, `StepPlan`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from lowprec_jax.recipes import NONE, Recipe
from lowprec_jax.roofline.chips import Chip
from lowprec_jax.roofline.communication import Message, seconds
from lowprec_jax.roofline.gemm import Cost, Rates, traffic_cost
from lowprec_jax.roofline.layer import LayerWork, layer_cost

__all__ = ["ChipWork", "Compute", "StepPlan", "StepTime", "compute_time", "step_time"]


@dataclasses.dataclass(frozen=True)
class ChipWork:
    """What one chip computes in a training step, whatever the number of chips.

    Attributes:
      layers: its linear layers.
      attention: scores and values, forward and backward, in bf16.
      kept_bytes: what the backward pass needs of the forward pass, all micro-batches, if nothing
        is recomputed.
      optimizer_bytes: what the optimizer reads and writes.
      recomputes: attention, and what is not a product, run forward twice.
    """

    layers: tuple[LayerWork, ...]
    attention: Cost
    kept_bytes: float
    optimizer_bytes: float
    recomputes: bool = False


class Compute(NamedTuple):
    """Seconds of the parts of a step that are not communication."""

    layers: float
    attention: float
    kept: float
    optimizer: float


def compute_time(work: ChipWork, rates: Rates, *, high: bool = False) -> Compute:
    """What a chip computes.

    Args:
      work: its work.
      rates: the chip.
      high: all layers in bf16.
    """
    recipe: Recipe | None = NONE if high else None
    layers = 0.0
    for layer in work.layers:
        cost = layer_cost(layer, rates, recipe)
        layers += cost.total.seconds + layer.casts_again * cost.forward_casts.seconds
        layers += cost.gemms["fwd"].seconds if layer.product_again else 0.0
    # A forward pass is a third of the products.
    attention = work.attention.seconds * (4 / 3 if work.recomputes else 1)
    kept, optimizer = (
        traffic_cost(moved, rates.bytes).seconds
        for moved in (2 * work.kept_bytes * (1.5 if work.recomputes else 1), work.optimizer_bytes)
    )
    return Compute(layers, attention, kept, optimizer)


class StepTime(NamedTuple):
    """Seconds of a step.

    Attributes:
      compute: what the chip computes.
      hidden: communication that runs beside it.
      exposed: communication that it waits for.
    """

    compute: float
    hidden: float
    exposed: float

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.exposed

    @property
    def serial(self) -> float:
        """The step if nothing overlaps."""
        return self.compute + self.hidden + self.exposed


def step_time(compute: Compute, messages: Sequence[Message], chip: Chip) -> StepTime:
    """Adds communication to the compute time.

    Args:
      compute: of one chip.
      messages: those of the mesh.
      chip: the chip, with its links.
    """
    busy = sum(compute)
    beside = sum(seconds(m, chip) for m in messages if m.overlaps)
    alone = sum(seconds(m, chip) for m in messages if not m.overlaps)
    return StepTime(busy, min(beside, busy), alone + max(0.0, beside - busy))


class StepPlan(NamedTuple):
    """A step on a number of chips.

    Attributes:
      chips: all of them.
      tokens: tokens of a step on all of them.
      messages: what one chip sends.
      compute: parts of the compute time.
      low: time with the recipes of the rules.
      high: time with all layers in bf16.
      ideal: seconds of the model's products at the peaks, see `training.efficiency`.
      memory: bytes on a chip, by what they are for.
    """

    chips: int
    tokens: int
    messages: list[Message]
    compute: Compute
    low: StepTime
    high: StepTime
    ideal: float
    memory: dict[str, float]
