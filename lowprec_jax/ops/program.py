"""What a lowered program really multiplies: FP8, exact upcasts of FP8, or something else."""

from typing import Any, NamedTuple

# Ops that change how a value is laid out or typed, not where it comes from.
_TRANSPARENT = {
    "stablehlo.bitcast_convert",
    "stablehlo.broadcast_in_dim",
    "stablehlo.convert",
    "stablehlo.optimization_barrier",
    "stablehlo.reshape",
    "stablehlo.transpose",
}
_LOW_PRECISION = ("f8", "f6", "f4")


class GemmCount(NamedTuple):
    """Matmuls of a program, each as often as the program executes it (loops multiplied).

    Attributes:
      native: both operands are in low precision.
      emulated: both are exact upcasts of low precision.
      other: all the rest.
    """

    native: int
    emulated: int
    other: int

    @property
    def total(self) -> int:
        """All matmuls."""
        return sum(self)


def count_gemms(lowered: Any) -> GemmCount:
    """Counts the matmuls of a program by what they multiply.

    Args:
      lowered: what ``jax.jit(f).lower(...)`` returns, for any platform.

    Returns:
      The counts. A loop whose trip count is not a constant counts once.
    """
    module = lowered.compiler_ir(dialect="stablehlo")
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
    counts = {"native": 0, "emulated": 0, "other": 0}

    def visit(operation: Any, times: int) -> None:
        for region in operation.regions:
            for block in region.blocks:
                for op in block.operations:
                    op = op.operation
                    if op.name == "stablehlo.dot_general":
                        counts[_kind(op)] += times
                    elif op.name == "func.call":
                        visit(functions[op.attributes["callee"].value].operation, times)
                    trips = _trip_count(op) if op.name == "stablehlo.while" else 1
                    visit(op, times * trips)

    visit(functions["main"].operation, 1)
    return GemmCount(**counts)


def _kind(dot: Any) -> str:
    if all(_is_low_precision(operand) for operand in dot.operands):
        return "native"
    return "emulated" if all(_comes_from_low_precision(x) for x in dot.operands) else "other"


def _is_low_precision(value: Any) -> bool:
    return str(value.type.element_type).startswith(_LOW_PRECISION)


def _comes_from_low_precision(value: Any) -> bool:
    while not _is_low_precision(value):
        owner = value.owner
        if getattr(owner, "name", None) not in _TRANSPARENT:
            return False
        operands = owner.operands
        value = operands[value.result_number] if len(operands) > 1 else operands[0]
    return True


def _trip_count(loop: Any) -> int:
    """Trips of a counted loop (`lax.scan`, `fori_loop` from 0): the bound in its condition."""
    for op in loop.regions[0].blocks[0].operations:
        op = op.operation
        if op.name == "stablehlo.compare":
            bound = op.operands[1].owner
            if getattr(bound, "name", None) == "stablehlo.constant":
                return max(int(bound.attributes["value"].get_splat_value().value), 1)
    return 1
