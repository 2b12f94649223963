"""Counts of what a program does to whole operands: what makes a step slow, seen without a clock.

Not the number of instructions, which changes with every constant. An array is *whole* if it has at
least as many elements as the smallest operand of the GEMMs: scales, state and blocks are not.

``python tests/ops/structure.py`` prints the table of `test_structure.py` as the programs are now.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowprec_jax import ops, state
from lowprec_jax.ops import hlo
from lowprec_jax.ops.program import executed_operations
from lowprec_jax.recipes import get_recipe, init_state, recipes

DIMENSIONS = (((1,), (0,)), ((), ()))  # [M, K] x [K, N]
# M, K, N: no two are equal, blocks of 128 fit, the kept input is transposed at once.
SMALL = (128, 256, 384)
# Its bytes are more than `numerics.transpose` moves at once: the CPU moves them in blocks.
LARGE = (256, 320, 384)
# The recipe and the shape of each row.
CASES: dict[str, tuple[str, tuple[int, int, int]]] = {
    **{recipe.name: (recipe.name, SMALL) for recipe in recipes()},
    "fp8_delayed, large": ("fp8_delayed", LARGE),
}

# Instructions that name or hold values; what a loop, call or branch does is counted in there.
_FREE = {
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "while",
}
_MOVES = {"copy", "transpose"}
# XLA:CPU cuts a long reduction in two, a window first and then one of what is left, not whole.
_REDUCES = {"reduce", "reduce-window"}
_Computations = dict[str, list[hlo.Instruction]]


class Compiled(NamedTuple):
    """What XLA made of a program.

    Attributes:
      dots: matrix products, those in fusions too.
      passes: instructions that read or write a whole array, without the products: each is a way
        through memory. What the body of a loop does counts once.
      reduces: of whole arrays, those in fusions too; one of several values counts once.
      moves: transposes and copies of whole arrays, likewise; one after the other count once.
      loops: of any size.
      collectives: of any size.
    """

    dots: int
    passes: int
    reduces: int
    moves: int
    loops: int
    collectives: int


class Lowered(NamedTuple):
    """What a program asks XLA for, as often as it executes it.

    Attributes:
      native: GEMMs of codes, see `lowprec_jax.ops.GemmCount`.
      upcast: GEMMs of upcast codes, "emulated" there.
      other: the other GEMMs; rotations are among them.
      f32: those of all of them with an operand in f32.
      encodes: conversions of whole arrays to 8 bits or less.
      decodes: conversions of whole arrays from 8 bits or less.
      reduces: of whole arrays; one of several values counts once.
      moves: transposes of whole arrays.
    """

    native: int
    upcast: int
    other: int
    f32: int
    encodes: int
    decodes: int
    reduces: int
    moves: int


class Structure(NamedTuple):
    """A program compiled for the CPU, and lowered for two platforms."""

    compiled: Compiled
    cpu: Lowered
    cuda: Lowered


def layer_structure(recipe: str, shape: tuple[int, int, int]) -> Structure:
    """Counts of one layer: forward, backward, and the advance of its state.

    Args:
      recipe: name of the recipe.
      shape: M, K, N of the forward product.
    """
    m, k, n = shape

    def step(x, w, g, scaling):
        live = state.make_sinks(scaling)

        def layer(x, w):
            return ops.dot_general(x, w, DIMENSIONS, recipe=recipe, state=live)

        y, pull = jax.vjp(layer, x, w)
        return y, *pull(g), state.advance(state.collect(scaling, live))

    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((m, k), (k, n), (m, n))]
    traced = jax.jit(step).trace(*arrays, init_state(get_recipe(recipe)))
    cpu, cuda = (traced.lower(lowering_platforms=(platform,)) for platform in ("cpu", "cuda"))
    whole = min(array.size for array in arrays)
    return Structure(
        compiled_structure(cpu.compile(), whole),
        lowered_structure(cpu, whole),
        lowered_structure(cuda, whole),
    )


def compiled_structure(compiled: Any, whole: int) -> Compiled:
    """Counts in the optimized HLO of a compiled program.

    Args:
      compiled: what ``lowered.compile()`` returns.
      whole: elements of an array that is whole.
    """
    computations, entry = hlo.parse(compiled.as_text())
    assert entry is not None
    large = {name: _large(body, whole) for name, body in computations.items()}
    executed = list(_executed(computations, entry))
    return Compiled(
        dots=sum(i.opcode == "dot" for body in computations.values() for i in body),
        passes=sum(
            i.opcode not in _FREE and not _is_product(i, computations)
            for name in executed
            for i in large[name]
        ),
        reduces=sum(i.opcode in _REDUCES for body in large.values() for i in body),
        moves=sum(len(_moves(body)) for body in large.values()),
        loops=sum(i.opcode == "while" for name in executed for i in computations[name]),
        collectives=len(ops.collectives(compiled)),
    )


def lowered_structure(lowered: Any, whole: int) -> Lowered:
    """Counts in the StableHLO of a program.

    Args:
      lowered: what ``traced.lower(lowering_platforms=(platform,))`` returns.
      whole: elements of an array that is whole.
    """
    counts: dict[str, int] = dict.fromkeys(("f32", "encodes", "decodes", "reduces", "moves"), 0)
    for executed in executed_operations(lowered):
        kind = _kind(executed.op, whole)
        if kind is not None:
            counts[kind] += executed.times
    return Lowered(*ops.count_gemms(lowered), **counts)


def rows(table: dict[str, Structure]) -> str:
    """Rows of a table as Python source."""
    lines = []
    for name, structure in table.items():
        fields = (f"        {field}={value},\n" for field, value in structure._asdict().items())
        lines.append(f'    "{name}": Structure(\n{"".join(fields)}    ),\n')
    return "".join(lines)


def _large(body: list[hlo.Instruction], whole: int) -> list[hlo.Instruction]:
    """The instructions of a computation that read or write a whole array."""
    large = {i.name for i in body if _elements(i.type) >= whole}
    return [i for i in body if not large.isdisjoint((i.name, *_operands(i)))]


def _moves(body: list[hlo.Instruction]) -> list[hlo.Instruction]:
    """The transposes and copies that do not follow another: XLA:CPU writes one as a pair."""
    moves = {i.name: i for i in body if i.opcode in _MOVES}
    return [i for i in moves.values() if not any(name in moves for name in _operands(i))]


def _operands(i: hlo.Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", i.operands)


def _elements(text: str) -> int:
    """Of the largest array in an HLO type, which may be a tuple: ``(f32[4,8]{1,0}, s32[])``."""
    shapes = re.findall(r"\w\[([\d,]*)\]", text)
    return max((math.prod(map(int, filter(None, s.split(",")))) for s in shapes), default=0)


def _executed(computations: _Computations, name: str) -> Iterator[str]:
    """The computations whose instructions run one by one: the entry, loops, calls, branches."""
    yield name
    for i in computations[name]:
        if i.opcode in ("while", "conditional", "call"):
            for callee, _, _ in hlo.callees(i):
                yield from _executed(computations, callee)


def _is_product(i: hlo.Instruction, computations: _Computations) -> bool:
    """Whether an instruction is a matrix product, or a fusion with one."""
    if i.opcode != "fusion":
        return i.opcode == "dot"
    return any(j.opcode == "dot" for name, _, _ in hlo.callees(i) for j in computations[name])


def _kind(op: Any, whole: int) -> str | None:
    """The count of `Lowered` that a StableHLO operation belongs to, the kinds of GEMMs aside."""
    if op.name == "stablehlo.dot_general":
        return "f32" if any(_bits(x) == 32 for x in op.operands) else None
    named = {"stablehlo.reduce": "reduces", "stablehlo.transpose": "moves"}
    if op.name not in (*named, "stablehlo.convert"):
        return None
    if math.prod(op.operands[0].type.shape) < whole:
        return None
    if op.name in named:
        return named[op.name]
    before, after = _bits(op.operands[0]), _bits(op.results[0])
    if after <= 8 < before:
        return "encodes"
    return "decodes" if 1 < before <= 8 < after else None  # one bit: a flag


def _bits(value: Any) -> int:
    """Width of the elements: ``f8E4M3FN``, ``ui8``, ``f32``, ``i1``."""
    return int(re.findall(r"\d+", str(value.type.element_type))[0])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(f"EXPECTED = {{\n{rows({case: layer_structure(*CASES[case]) for case in CASES})}}}")
