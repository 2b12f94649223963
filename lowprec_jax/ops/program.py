"""What a lowered program executes, and what it multiplies: codes, their upcasts, the rest."""

from collections.abc import Iterator
from typing import Any, NamedTuple

# Ops that change how a value is laid out or typed, not where it comes from.
_PLACEMENT = {"sdy.reshard", "sdy.sharding_constraint"}
_TRANSPARENT = {
    *_PLACEMENT,
    "stablehlo.bitcast_convert",
    "stablehlo.broadcast_in_dim",
    "stablehlo.convert",
    "stablehlo.optimization_barrier",
    "stablehlo.reshape",
    "stablehlo.reverse",  # of the window, where a convolution is transposed
    "stablehlo.transpose",
}
# Grouped matmuls have a third operand: the sizes of the groups.
_MATMULS = {"stablehlo.dot_general", "stablehlo.convolution", "chlo.ragged_dot"}
_LOW_PRECISION = ("f8", "f6", "f4", "i8", "i4")
# Functions of `lowprec_jax.ops` whose results are codes in a wider type, times their scales or not.
_UPCASTS = ("_upcast_operand", "dequantized_operand")


class GemmCount(NamedTuple):
    """Matmuls and convolutions of a program, each as often as it executes them (loops multiplied).

    Attributes:
      native: both operands are in low precision.
      emulated: both are upcasts of low precision.
      other: all the rest.
    """

    native: int
    emulated: int
    other: int

    @property
    def total(self) -> int:
        """All matmuls and convolutions."""
        return sum(self)


def count_gemms(lowered: Any) -> GemmCount:
    """Counts the matmuls of a program by what they multiply, grouped ones and convolutions too.

    Args:
      lowered: what ``jax.jit(f).lower(...)`` returns, for any platform.

    Returns:
      The counts. A loop whose trip count is not a constant counts once.
    """
    counts = {"native": 0, "emulated": 0, "other": 0}
    for executed in executed_operations(lowered):
        if executed.op.name in _MATMULS:
            counts[_kind(executed.op)] += executed.times
    return GemmCount(**counts)


class Executed(NamedTuple):
    """An operation of a program, and how often one run of the program executes it.

    Attributes:
      op: the StableHLO operation.
      times: product of the trip counts of the loops around it.
      exact: False inside a loop whose trip count is not a constant, which counts once, and inside
        a branch, as if it was taken: of the branches of a conditional only one runs.
    """

    op: Any
    times: int
    exact: bool


def executed_operations(lowered: Any) -> Iterator[Executed]:
    """The StableHLO operations of a lowered program, calls followed and loops multiplied.

    Args:
      lowered: what ``jax.jit(f).lower(...)`` returns, for any platform.
    """
    module = lowered.compiler_ir(dialect="stablehlo")
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}

    def visit(operation: Any, times: int, exact: bool) -> Iterator[Executed]:
        for region, repeated, known in _regions(operation):
            for block in region.blocks:
                for op in block.operations:
                    found = Executed(op.operation, times * repeated, exact and known)
                    yield found
                    if found.op.name == "func.call":
                        callee = functions[found.op.attributes["callee"].value]
                        yield from visit(callee.operation, found.times, found.exact)
                    yield from visit(*found)

    yield from visit(functions["main"].operation, 1, True)


def _regions(op: Any) -> list[tuple[Any, int, bool]]:
    """``(region, how often it runs each time the operation does, whether that is exact)``."""
    if op.name == "stablehlo.while":
        trips = _trip_count(op)
        known = trips is not None
        # The condition runs once more than the body.
        return [
            (op.regions[0], trips + 1 if known else 1, known),
            (op.regions[1], trips if known else 1, known),
        ]
    exact = op.name not in ("stablehlo.case", "stablehlo.if")
    return [(region, 1, exact) for region in op.regions]


def _kind(matmul: Any) -> str:
    operands = list(matmul.operands)[:2]
    if all(_is_low_precision(x) for x in operands):
        return "native"
    return "emulated" if all(_comes_from_low_precision(x) for x in operands) else "other"


def _is_low_precision(value: Any) -> bool:
    return str(value.type.element_type).startswith(_LOW_PRECISION)


def _comes_from_low_precision(value: Any) -> bool:
    while not (_is_low_precision(value) or _is_upcast(value)):
        source = _source(value)
        if source is None:
            return False
        value = source
    return True


def _is_upcast(value: Any) -> bool:
    owner = value.owner
    if getattr(owner, "name", None) != "func.call":
        return False
    return owner.attributes["callee"].value.startswith(_UPCASTS)


def _source(value: Any) -> Any:
    """The value with the same numbers that a value was made from, or None.

    Zeros may be in their place: so the CPU masks the rows of other groups in a grouped matmul.
    """
    owner = value.owner
    name = getattr(owner, "name", None)
    if name == "stablehlo.select":
        _, chosen, otherwise = owner.operands
        return chosen if _is_zero(otherwise) else None
    if name not in _TRANSPARENT:
        return None
    operands = owner.operands
    return operands[value.result_number] if len(operands) > 1 else operands[0]


def _is_zero(value: Any) -> bool:
    if getattr(value.owner, "name", None) == "stablehlo.broadcast_in_dim":
        value = value.owner.operands[0]
    return _constant(value) == 0


def _trip_count(loop: Any) -> int | None:
    """Trips of a counted loop (`lax.scan`, `fori_loop`), None of another.

    A counter starts at a constant and grows by a constant while it is below a constant.
    """
    condition, body = (region.blocks[0] for region in loop.regions)
    compare = _unplaced(_terminator(condition).operands[0]).owner
    if getattr(compare, "name", None) != "stablehlo.compare" or "LT" not in str(
        compare.attributes["comparison_direction"]
    ):
        return None
    index = _argument(condition, compare.operands[0])
    if index is None:
        return None
    step = _unplaced(_terminator(body).operands[index]).owner
    if getattr(step, "name", None) != "stablehlo.add":
        return None
    if _argument(body, step.operands[0]) != index:
        return None
    values = (loop.operands[index], compare.operands[1], step.operands[1])
    start, bound, by = (_integer_constant(value) for value in values)
    if start is None or bound is None or by is None or by < 1:
        return None
    return max(-(-(bound - start) // by), 0)


def _unplaced(value: Any) -> Any:
    """The same value before it was put on a mesh."""
    while getattr(value.owner, "name", None) in _PLACEMENT:
        value = value.owner.operands[0]
    return value


def _terminator(block: Any) -> Any:
    return list(block.operations)[-1].operation


def _argument(block: Any, value: Any) -> int | None:
    """The position of a value among the arguments of a block, None if it is not one of them."""
    value = _unplaced(value)
    return next((i for i, argument in enumerate(block.arguments) if argument == value), None)


def _integer_constant(value: Any) -> int | None:
    constant = _constant(value)
    return constant if isinstance(constant, int) and not isinstance(constant, bool) else None


def _constant(value: Any) -> int | float | bool | None:
    """The number that a constant holds everywhere, None if it is no such constant."""
    value = _unplaced(value)
    if getattr(value.owner, "name", None) != "stablehlo.constant":
        return None
    constant = value.owner.attributes["value"]
    return constant.get_splat_value().value if constant.is_splat else None
