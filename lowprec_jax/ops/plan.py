"""The dry-run table: what would be quantized, what not, why, and what share of the work it is."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lowprec_jax.recipes import Assignment

# Name of the jitted function that marks the matmul of a layer in a traced program.
_LAYER_MARK = "lowprec_layer:"


@dataclasses.dataclass(frozen=True)
class Matmul:
    """Matmuls and convolutions of one place in a program.

    Attributes:
      layer: path of the layer they belong to; empty for code that the adapter cannot reach.
      lhs: shape of the left operand.
      rhs: shape of the right operand.
      calls: how often the program runs them (loops multiplied).
      flops: floating-point operations of all calls, 2 per multiply-add.
    """

    layer: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    calls: int
    flops: int


def mark_layer(path: str, op: Callable) -> Callable:
    """`op` inside a jitted function whose name says which layer it belongs to."""

    def call(*args, **kwargs):
        statics = [i for i, x in enumerate(args) if not isinstance(x, jax.Array)]
        arrays = [x for x in args if isinstance(x, jax.Array)]

        def layer(*arrays):
            rest = iter(arrays)
            merged = [args[i] if i in statics else next(rest) for i in range(len(args))]
            return op(*merged, **kwargs)

        layer.__name__ = _LAYER_MARK + path
        return jax.jit(layer)(*arrays)

    return call


def find_matmuls(jaxpr: Any) -> list[Matmul]:
    """All matmuls and convolutions of a traced program (`jax.make_jaxpr`), by path of the layer."""
    return list(_walk(getattr(jaxpr, "jaxpr", jaxpr), "", 1))


def _matmul_depth(rhs: tuple[int, ...], dimension_numbers: Any) -> int:
    (_, contracted), _ = dimension_numbers
    return math.prod(rhs[axis] for axis in contracted)


def _convolution_depth(rhs: tuple[int, ...], dimension_numbers: Any) -> int:
    _, *contracted = dimension_numbers.rhs_spec
    return math.prod(rhs[axis] for axis in contracted)


# Multiply-adds for each element of the result.
_DEPTHS = {"dot_general": _matmul_depth, "conv_general_dilated": _convolution_depth}


def _walk(jaxpr: Any, layer: str, calls: int) -> Iterator[Matmul]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _DEPTHS:
            lhs, rhs = (tuple(v.aval.shape) for v in eqn.invars)
            depth = _DEPTHS[eqn.primitive.name](rhs, eqn.params["dimension_numbers"])
            flops = 2 * depth * math.prod(eqn.outvars[0].aval.shape)
            yield Matmul(layer, lhs, rhs, calls, calls * flops)
        if eqn.primitive.name == "cond":  # one branch runs: the most work there can be
            branches = [list(_walk(b.jaxpr, layer, calls)) for b in eqn.params["branches"]]
            yield from max(branches, key=lambda found: sum(matmul.flops for matmul in found))
            continue
        name = str(eqn.params.get("name", ""))
        inside = name.removeprefix(_LAYER_MARK) if name.startswith(_LAYER_MARK) else layer
        trips = int(eqn.params.get("length", 1)) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner, inside, calls * trips)


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One line of a plan.

    Attributes:
      layer: path; for unreachable matmuls the shapes.
      calls: matmuls in one forward pass.
      shapes: ``lhs x rhs`` of a call.
      recipe: name of the recipe, ``"none"`` for high precision.
      reason: why.
      flop_share: part of the forward pass's matmul work.
    """

    layer: str
    calls: int
    shapes: str
    recipe: str
    reason: str
    flop_share: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a set of rules does to a model; ``print(plan)`` shows it as a table."""

    rows: tuple[PlanRow, ...]

    @property
    def quantized_share(self) -> float:
        """Part of the forward pass's matmul work that runs in low precision."""
        return sum(row.flop_share for row in self.rows if row.recipe != "none")

    def __str__(self) -> str:
        header = ("layer", "calls", "lhs x rhs", "recipe", "FLOPs", "reason")
        body = [
            (r.layer, str(r.calls), r.shapes, r.recipe, f"{r.flop_share:.1%}", r.reason)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, *body)
        ]
        lines.append(f"{self.quantized_share:.1%} of the matmul FLOPs in low precision.")
        return "\n".join(lines)


def make_plan(assignments: Sequence[Assignment], matmuls: Sequence[Matmul]) -> Plan:
    """Joins the recipes of the layers with the work they do.

    Args:
      assignments: from `lowprec_jax.recipes.assign`.
      matmuls: from `find_matmuls` of the forward pass, layers marked.

    Returns:
      A row for each layer, those without work included, then one for each shape of matmul that
      belongs to no layer: raw ``@`` and ``einsum`` stay as they are.
    """
    total = max(sum(m.flops for m in matmuls), 1)

    def row(name: str, found: Sequence[Matmul], recipe: str, reason: str) -> PlanRow:
        shapes = f"{list(found[0].lhs)} x {list(found[0].rhs)}" if found else "not called"
        share = sum(m.flops for m in found) / total
        return PlanRow(name, sum(m.calls for m in found), shapes, recipe, reason, share)

    rows = [
        row(a.path, [m for m in matmuls if m.layer == a.path], a.recipe.name, a.reason)
        for a in assignments
    ]
    others: dict[tuple, list[Matmul]] = {}
    for matmul in matmuls:
        if not matmul.layer:
            others.setdefault((matmul.lhs, matmul.rhs), []).append(matmul)
    rows += [row("(no layer)", found, "none", "not reachable") for found in others.values()]
    return Plan(tuple(rows))
