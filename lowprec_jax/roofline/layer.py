"""The three GEMMs of a linear layer under a recipe, with what quantization adds, against bf16.

A GEMM in low precision reads codes instead of bf16. Making them costs traffic of its own:

    amax     current scaling reads the tensor once more, for the scale of the whole tensor
    cast     the tensor is read once, and each form of it written once: two GEMMs contract an
             operand along different axes, and hardware wants the contraction last, so that an
             operand of two GEMMs is written twice, even where its codes are the same
    scales   one for each tile, written with the codes

A GEMM that the chip does not multiply as codes (`lowprec_jax.recipes.translate` says so) reads
them, writes bf16, and runs at the rate of bf16. Casts are kernels of their own here: a compiler
that fuses them into the layer before does better.

Public names: `LayerWork`, `LayerCost`, `layer_cost`, `verdict`, `break_even_tokens`,
`break_even_square`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from lowprec_jax.numerics import Quantizer
from lowprec_jax.recipes import Gemm, Recipe, Role, get_target, translate
from lowprec_jax.roofline.gemm import Cost, Rates, Shape, gemm_cost, traffic_cost

__all__ = [
    "LayerCost",
    "LayerWork",
    "break_even_square",
    "break_even_tokens",
    "layer_cost",
    "verdict",
]

GEMMS = ("fwd", "dgrad", "wgrad")
HIGH_BYTES = 2  # bf16
GRAD_BYTES = 4  # gradients of weights are f32
_SIDES = {
    "fwd": (Role.LHS, Role.RHS),
    "dgrad": (Role.OUTPUT_GRAD, Role.RHS),
    "wgrad": (Role.LHS, Role.OUTPUT_GRAD),
}
_E8M0_BYTES, _F32_BYTES = 1, 4
_WORTH = 1.05  # gains below are lost in what a roofline leaves out
_LARGEST = 2**24


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """A linear layer as one chip sees it.

    Attributes:
      path: path of the layer.
      shape: ``(tokens, inputs, outputs)`` of its forward GEMM.
      calls: layers of that shape times micro-batches.
      recipe: its recipe.
      reason: why it has that recipe.
      weight_bytes: bytes of an element of the stored weights.
      casts_again: the backward pass makes the operands of the forward pass again (remat).
      product_again: it computes the forward product again.
    """

    path: str
    shape: Shape
    calls: int
    recipe: Recipe
    reason: str = ""
    weight_bytes: int = 4
    casts_again: bool = False
    product_again: bool = False

    @property
    def shapes(self) -> dict[str, Shape]:
        """The sizes of the three GEMMs."""
        m, k, n = self.shape
        return {"fwd": Shape(m, k, n), "dgrad": Shape(m, n, k), "wgrad": Shape(k, m, n)}


class LayerCost(NamedTuple):
    """What a layer costs in a training step, all calls.

    Attributes:
      gemms: the three GEMMs, by name, without what makes their operands.
      forward_casts: casts of the forward pass.
      backward_casts: casts of the backward pass.
    """

    gemms: dict[str, Cost]
    forward_casts: Cost
    backward_casts: Cost

    @property
    def total(self) -> Cost:
        """All of it."""
        return sum(self.gemms.values(), self.casts)

    @property
    def casts(self) -> Cost:
        """What makes the operands, without the GEMMs."""
        return self.forward_casts + self.backward_casts


def layer_cost(work: LayerWork, rates: Rates, recipe: Recipe | None = None) -> LayerCost:
    """A training step of a layer, forward and backward.

    Args:
      work: the layer.
      rates: the chip.
      recipe: in place of the layer's own; `lowprec_jax.recipes.NONE` gives bf16.
    """
    recipe = work.recipe if recipe is None else recipe
    costs = {name: _gemm(name, work, recipe, rates) for name in GEMMS}
    casts = {role: _casts(role, work, recipe, rates) for role in Role}
    forward = casts[Role.LHS] + casts[Role.RHS]
    return LayerCost(
        {name: cost.times(work.calls) for name, cost in costs.items()},
        forward.times(work.calls),
        casts[Role.OUTPUT_GRAD].times(work.calls),
    )


def verdict(work: LayerWork, low: Cost, high: Cost, rates: Rates) -> str:
    """Whether low precision pays for a layer, and if not, why."""
    if not work.recipe.quantizes:
        return f"stays high: {work.reason}"
    native = [n for n in GEMMS if work.recipe.gemm(n) and is_native(work.recipe, n, rates)]
    if not native:
        return f"keep high: {rates.chip.name} does not multiply these codes"
    if math.isnan(low.seconds):
        return "n/a: the rates of the chip are not known"
    gain = high.seconds / low.seconds
    if gain >= _WORTH:
        return f"pays {gain:.2f}x"
    if all(_multiply_rate(work.recipe, n, rates) <= rates.flops(16) for n in native):
        return f"keep high: {gain:.2f}x, {rates.chip.name} multiplies them no faster than bf16"
    return f"keep high: {gain:.2f}x, casts cost what the GEMMs save"


def is_native(recipe: Recipe, name: str, rates: Rates) -> bool:
    """Whether the chip multiplies the codes of a GEMM, whatever the speed."""
    target = dataclasses.replace(get_target(str(rates.chip.target)), no_gain=())
    gemm = getattr(recipe, name)
    alone = dataclasses.replace(recipe, **{**dict.fromkeys(GEMMS), name: gemm})
    # Twice: what is said of the second is of emulation only, its formats are the chip's already.
    return not translate(translate(alone, target).recipe, target).messages


def break_even_tokens(work: LayerWork, rates: Rates) -> int | None:
    """The fewest tokens of a call, a multiple of 16, for which the recipe beats bf16.

    Returns:
      None if it never does.
    """
    return _smallest(lambda m: dataclasses.replace(work, shape=work.shape._replace(m=m)), rates)


def break_even_square(work: LayerWork, rates: Rates) -> int | None:
    """The smallest size n, a multiple of 16, of a layer ``[n, n] x [n, n]`` that gains."""
    return _smallest(lambda n: dataclasses.replace(work, shape=Shape(n, n, n)), rates)


def _smallest(make: Callable[[int], LayerWork], rates: Rates) -> int | None:
    none = dataclasses.replace(make(16).recipe, fwd=None, dgrad=None, wgrad=None)

    def gains(units: int) -> bool:
        work = make(16 * units)
        low, high = (layer_cost(work, rates, r).total.seconds for r in (None, none))
        return low < high

    low, high = 0, 1
    while not gains(high):
        low, high = high, 2 * high
        if 16 * high > _LARGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gains(middle) else (middle, high)
    return 16 * high


def _gemm(name: str, work: LayerWork, recipe: Recipe, rates: Rates) -> Cost:
    shape, gemm = work.shapes[name], recipe.gemm(name)  # pyright: ignore[reportArgumentType]
    out = GRAD_BYTES if name == "wgrad" else HIGH_BYTES
    if gemm is not None and is_native(recipe, name, rates):
        left, right = (_bits(side) / 8 for side in (gemm.left, gemm.right))
        return gemm_cost(shape, left, right, out, _multiply_rate(recipe, name, rates), rates.bytes)
    cost = gemm_cost(shape, HIGH_BYTES, HIGH_BYTES, out, rates.flops(16), rates.bytes)
    if gemm is None:
        return cost
    sizes = shape.m * shape.k, shape.k * shape.n
    dequantized = sum(
        size * (_bits(side) / 8 + HIGH_BYTES)
        for size, side in zip(sizes, (gemm.left, gemm.right), strict=True)
        if side is not None
    )
    return cost + traffic_cost(dequantized, rates.bytes)


def _multiply_rate(recipe: Recipe, name: str, rates: Rates) -> float:
    gemm: Gemm = getattr(recipe, name)
    formats = [side.format for side in (gemm.left, gemm.right) if side is not None]
    integer = all(fmt.name.startswith("int") for fmt in formats)
    return rates.flops(max(fmt.bits for fmt in formats), integer=integer)


def _bits(quantizer: Quantizer | None) -> int:
    return 8 * HIGH_BYTES if quantizer is None else quantizer.format.bits


def _casts(role: Role, work: LayerWork, recipe: Recipe, rates: Rates) -> Cost:
    """What makes the operands of a role for its two GEMMs."""
    m, k, n = work.shape
    size, stored = {
        Role.LHS: (m * k, HIGH_BYTES),
        Role.RHS: (k * n, work.weight_bytes),
        Role.OUTPUT_GRAD: (m * n, HIGH_BYTES),
    }[role]
    quantizers = [q for q in recipe.quantizers_of(role) if q is not None]
    moved = 0.0
    if stored > HIGH_BYTES and len(quantizers) < 2:  # wider weights, and a GEMM that wants bf16
        moved += size * (stored + HIGH_BYTES)
    if quantizers:
        amax = recipe.scaling == "current" and any(q.needs_tensor_amax for q in quantizers)
        moved += size * stored * (2 if amax else 1)
        moved += sum(size * q.format.bits / 8 + _scale_bytes(q, size) for q in quantizers)
    return traffic_cost(moved, rates.bytes)


def _scale_bytes(quantizer: Quantizer, size: int) -> float:
    """Bytes of the scales of an operand; those of whole rows are too few to matter."""
    if quantizer.contract is None:
        return 0.0
    each = _F32_BYTES if quantizer.scale in ("float", "power_of_two") else _E8M0_BYTES
    return each * size / (quantizer.contract * (quantizer.free or 1))
