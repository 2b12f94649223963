"""What a program communicates: its collectives, how often they run, and the bytes they move.

Two readers of one report. `collectives` reads what XLA made of the program: collectives that the
partitioner inserted are there, and several `psum` may have become one. `stablehlo_collectives`
reads the program as it was written, under `jax.shard_map`. The types on the wire must be read
there when the backend is the CPU: XLA:CPU widens bf16 collectives to f32 and f8 ones to f16.

Other collectives than the five of `WIRE_FACTORS` (ragged all-to-all, broadcast) are not reported.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lowprec_jax.ops import hlo
from lowprec_jax.ops.program import Executed, executed_operations

# Bytes that one of n devices sends in a ring, per byte of payload.
WIRE_FACTORS = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Tensor(NamedTuple):
    """Type of one operand or result on one device: name of the dtype in HLO (``"u8"``), shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes; types below 8 bits count as packed."""
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or [0])[0])
        return -(-math.prod(self.shape) * bits // 8)


class Collective(NamedTuple):
    """A collective of a program, with shapes as one device sees them.

    Attributes:
      kind: a key of `WIRE_FACTORS`.
      operands: one fused all-reduce has many.
      results: as the operands; an asynchronous pair counts once, with the results of its end.
      group_size: devices that communicate with each other. Of a permutation: the devices that
        send to or receive from another one, or 1.
      executed: how often one run of the program executes it.
      exact: False where `executed` is not certain: in a loop of unknown trip count, which counts
        once, and in the branches of a conditional, which all count as if taken.
    """

    kind: str
    operands: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    group_size: int
    executed: int
    exact: bool

    @property
    def dtype(self) -> str:
        """Type of the operands (the types, where they differ)."""
        return "+".join(sorted({x.dtype for x in self.operands}))

    @property
    def payload_bytes(self) -> int:
        """Bytes of one device over all executions: of the result of an all-gather, else operands.

        Zero for a group of one device, which communicates nothing.
        """
        tensors = self.results if self.kind == "all-gather" else self.operands
        return self.executed * sum(x.bytes for x in tensors) if self.group_size > 1 else 0

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends over all executions, with ring algorithms."""
        return WIRE_FACTORS[self.kind](self.group_size) * self.payload_bytes


def format_collectives(found: Iterable[Collective]) -> str:
    """A table of what is communicated: a line per kind and dtype, and the total.

    MB are 10**6 bytes, over all executions; wire MB are what one device sends. ``~`` marks counts
    that are not exact.
    """
    groups: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for collective in found:
        groups[collective.kind, collective.dtype].append(collective)
    rows = [("collective", "dtype", "executed", "operands", "payload MB", "wire MB per device")]
    rows += [_row(*key, group) for key, group in sorted(groups.items())]
    rows.append(_row("total", "", [c for group in groups.values() for c in group]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _row(kind: str, dtype: str, group: list[Collective]) -> tuple[str, ...]:
    mark = "" if all(c.exact for c in group) else "~"
    return (
        kind,
        dtype,
        f"{mark}{sum(c.executed for c in group)}",
        f"{mark}{sum(c.executed * len(c.operands) for c in group)}",
        f"{mark}{sum(c.payload_bytes for c in group) / 1e6:.3f}",
        f"{mark}{sum(c.wire_bytes for c in group) / 1e6:.3f}",
    )


# StableHLO: the program before XLA.


def stablehlo_collectives(lowered: Any) -> list[Collective]:
    """The collectives that a program asks for, in its order, before XLA changes them.

    Args:
      lowered: what ``jax.jit(f).lower(...)`` returns, for any platform.

    Returns:
      One entry per operation that is executed. Under plain ``jit`` there are none: the partitioner
      inserts them later.
    """
    kinds = {f"stablehlo.{kind.replace('-', '_')}": kind for kind in WIRE_FACTORS}
    return [
        _from_operation(kinds[executed.op.name], executed)
        for executed in executed_operations(lowered)
        if executed.op.name in kinds
    ]


def _from_operation(kind: str, executed: Executed) -> Collective:
    op = executed.op
    if kind == "collective-permute":
        pairs = _rows(op.attributes["source_target_pairs"])
        group_size = _moving_devices(pairs)
    else:
        # Groups of unequal size are padded with -1.
        group_size = max(
            sum(i >= 0 for i in group) for group in _rows(op.attributes["replica_groups"])
        )
    operands, results = (
        tuple(Tensor(_dtype_name(str(v.type.element_type)), tuple(v.type.shape)) for v in values)
        for values in (op.operands, op.results)
    )
    return Collective(kind, operands, results, group_size, executed.times, executed.exact)


def _rows(matrix: Any) -> list[list[int]]:
    """The rows of a dense integer attribute of rank 2."""
    rows, columns = matrix.type.shape
    flat = [int(i) for i in matrix]
    return [flat[i * columns : (i + 1) * columns] for i in range(rows)]


def _dtype_name(mlir: str) -> str:
    """The HLO name of an MLIR element type: i32 -> s32, ui8 -> u8, i1 -> pred."""
    if mlir == "i1":
        return "pred"
    if mlir.startswith("complex"):
        return "c64" if "32" in mlir else "c128"
    return re.sub(r"^i", "s", re.sub(r"^ui", "u", mlir)).lower()


def _moving_devices(pairs: Iterable[Iterable[int]]) -> int:
    moving = [{source, target} for source, target in pairs if source != target]
    return max(len(set().union(*moving)), 1)


# HLO: the program after XLA.


def collectives(compiled: Any) -> list[Collective]:
    """The collectives that a compiled program executes, in its order.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns.

    Returns:
      One entry per collective instruction and place it is called from.

    Raises:
      ValueError: the text of the program is not HLO with an entry computation.
    """
    text = compiled.as_text()
    computations, entry = hlo.parse(text)
    if entry is None:
        raise ValueError(
            "collectives: no ENTRY computation in compiled.as_text(). Pass the result of "
            "jax.jit(f).lower(...).compile() on a backend that prints HLO; before that, use "
            "stablehlo_collectives(lowered)."
        )
    devices = math.prod(map(int, re.findall(r"num_(?:partitions|replicas)=(\d+)", text)))

    def visit(name: str, times: int, exact: bool) -> Iterator[Collective]:
        types = {i.name: i.type for i in computations[name]}
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind in WIRE_FACTORS:
                yield _from_instruction(kind, i, types, devices, times, exact)
                continue
            for callee, repeated, known in hlo.callees(i):
                yield from visit(callee, times * repeated, exact and known)

    return list(visit(entry, 1, True))


def _from_instruction(
    kind: str, i: hlo.Instruction, types: dict[str, str], devices: int, times: int, exact: bool
) -> Collective:
    names = [name.split()[-1].lstrip("%") for name in hlo.split(i.operands)]
    operands = tuple(tensor for name in names for tensor in _tensors(types[name]))
    result = i.type
    if i.opcode.endswith("-start") and kind != "all-reduce":
        result = hlo.split(result[1:-1])[1]  # (operands, results, contexts...)
    return Collective(
        kind, operands, _tensors(result), _group_size(i.attributes, devices), times, exact
    )


def _group_size(attributes: str, devices: int) -> int:
    """Devices of a group, from any of the ways in which HLO writes groups."""
    if pairs := re.search(r"source_target_pairs=\{(?:(\{.*?\})\})?", attributes):
        return _moving_devices(re.findall(r"(\d+),(\d+)", pairs[1] or ""))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=@?mesh[\[<](.*?)[\]>].*?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", mesh[1]))
        axes = re.findall(r"'?(\w+)'?(?::\(\d+\)(\d+))?(?:,|$)", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    groups = re.search(r"replica_groups=\{\{(.*?)\}\}", attributes)
    if groups is None:
        return devices  # replica_groups={}
    return max(len(group.split(",")) for group in groups[1].split("},{"))


def _tensors(type_text: str) -> tuple[Tensor, ...]:
    """The array types in a type, tuples flattened: ``(f32[2,32]{1,0}, u8[])``."""
    return tuple(
        Tensor(dtype, tuple(int(d.removeprefix("<=")) for d in shape.split(",") if d))
        for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", type_text)
    )
