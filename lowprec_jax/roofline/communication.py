"""Messages of a training step, their bytes and their time.

Ring algorithms: factors of `lowprec_jax.ops.collectives.WIRE_FACTORS`, those of the reports on
compiled programs. Mesh axes are laid out with ``tensor`` innermost, then ``fsdp``, then ``data``.
A group within a node runs at the link. A larger one runs at the network of all its members in a
node together, at most the link: each of several rings leaves the node by another adapter.

Public names: `Message`, `MeshShape`, `kernel_messages`, `gradient_messages`, `seconds`.
"""

import math
from typing import NamedTuple

from lowprec_jax.ops.collectives import WIRE_FACTORS
from lowprec_jax.roofline.chips import Chip

__all__ = ["MeshShape", "Message", "gradient_messages", "kernel_messages", "seconds"]

LATENCY = 10e-6  # seconds of one hop; an assumption
REDUCE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}


class MeshShape(NamedTuple):
    """Sizes of the mesh axes."""

    data: int
    fsdp: int
    tensor: int

    @property
    def size(self) -> int:
        """All chips."""
        return math.prod(self)


class Message(NamedTuple):
    """Collectives of one kind and purpose in a training step.

    Attributes:
      what: what is sent.
      kind: a key of `WIRE_FACTORS`.
      payload: bytes on one chip over all of them; see `Collective.payload_bytes`.
      count: how many collectives.
      group: chips that communicate with each other.
      stride: distance of neighbours of the group in the order of chips.
      overlaps: whether a compiler can hide it behind products.
    """

    what: str
    kind: str
    payload: float
    count: float
    group: int
    stride: int
    overlaps: bool = False

    @property
    def wire(self) -> float:
        """Bytes that one chip sends."""
        return WIRE_FACTORS[self.kind](self.group) * self.payload if self.group > 1 else 0.0


def seconds(message: Message, chip: Chip) -> float:
    """Time of the collectives, one after the other: bytes over bandwidth, and latency.

    Latency is that of a tree, 10 us for each of its levels: an assumption.
    """
    if message.group == 1:
        return 0.0
    bandwidth = chip.link
    if message.group * message.stride > chip.node:
        members = max(1, chip.node // message.stride)
        bandwidth = min(chip.link, chip.network * members)
    hops = math.ceil(math.log2(message.group))
    return message.wire / (1e9 * bandwidth) + message.count * hops * LATENCY


def kernel_messages(
    what: str,
    kernel: float,
    gather_bytes: tuple[float, ...],
    calls: int,
    mesh: MeshShape,
    reduce: int,
) -> list[Message]:
    """FSDP: a kernel is gathered for each GEMM that reads it, its gradient reduce-scattered.

    Args:
      what: name of the kernel.
      kernel: elements of one kernel on the chips that share it, after tensor parallelism.
      gather_bytes: bytes of an element on the wire, for each gather of a micro-batch.
      calls: kernels times micro-batches.
      mesh: the mesh.
      reduce: bytes of an element of the sum of gradients.
    """
    group = mesh.fsdp, mesh.tensor, True
    return [
        Message(f"{what} gather", "all-gather", calls * kernel * sum(gather_bytes),
                calls * len(gather_bytes), *group),
        Message(f"{what} gradient", "reduce-scatter", calls * kernel * reduce, calls, *group),
    ]  # fmt: skip


def gradient_messages(
    shards: float, whole: float, mesh: MeshShape, reduce: int, zero1: bool, weight_bytes: int
) -> list[Message]:
    """Data parallelism: gradients are summed once a step, after the backward pass.

    Args:
      shards: elements on a chip of parameters that fsdp splits: summed over ``data``.
      whole: elements of the others: summed over ``data`` and ``fsdp``.
      mesh: the mesh.
      reduce: bytes of an element of the sum.
      zero1: each chip keeps its part of the sum, and the new parameters are gathered.
      weight_bytes: bytes of an element of a parameter.
    """
    stride = mesh.fsdp * mesh.tensor
    both = mesh.data * mesh.fsdp, mesh.tensor
    messages = [Message("gradients, replicated", "all-reduce", whole * reduce, 1, *both)]
    if not zero1:
        return [
            *messages,
            Message("gradients", "all-reduce", shards * reduce, 1, mesh.data, stride),
        ]
    return [
        *messages,
        Message("gradients", "reduce-scatter", shards * reduce, 1, mesh.data, stride),
        Message("parameters", "all-gather", shards * weight_bytes, 1, mesh.data, stride),
    ]
