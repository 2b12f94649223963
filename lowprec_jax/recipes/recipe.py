"""What a recipe is: the formats of the three GEMMs of a layer and where their scales come from."""

import dataclasses
import enum
from typing import Literal

import jax
import jax.numpy as jnp

from lowprec_jax.numerics import Format, Quantizer, as_quantizer


class Role(enum.IntEnum):
    """Which operand of a layer a tensor is; also its row in scaling state and observations."""

    LHS = 0
    RHS = 1
    OUTPUT_GRAD = 2


@dataclasses.dataclass(frozen=True, init=False)
class Gemm:
    """How the two operands of one matmul are quantized.

    Attributes:
      left: quantizer of the left operand; a format stands for one scale per tensor, None for high
        precision: the other operand is then dequantized (weight-only quantization).
      right: the same of the right operand.

    Raises:
      ValueError: a format that cannot be multiplied, nothing to quantize, operands rotated
        differently, or two 8-bit operands with two mantissa bits (no hardware multiplies e5m2 by
        e5m2; XLA falls back to f16 without a word).
    """

    left: Quantizer | None
    right: Quantizer | None

    def __init__(self, left: Quantizer | Format | None, right: Quantizer | Format | None):
        object.__setattr__(self, "left", as_quantizer(left))
        object.__setattr__(self, "right", as_quantizer(right))
        sides = [side for side in (self.left, self.right) if side is not None]
        if not sides:
            raise ValueError("Gemm: no operand is quantized; leave the GEMM None instead.")
        for fmt in (side.format for side in sides):
            if not (fmt.element and fmt.is_low_precision):
                raise ValueError(
                    f"Gemm: {fmt} is no low-precision element format; leave the GEMM None to "
                    "compute it in high precision."
                )
        if len(sides) == 1:
            if sides[0].hadamard:
                raise ValueError("Gemm: a Hadamard rotation needs both operands quantized.")
            return
        if sides[0].hadamard != sides[1].hadamard:
            raise ValueError(
                f"Gemm: operands are rotated by {sides[0].hadamard} and {sides[1].hadamard}; the "
                "rotation cancels only if both are rotated alike."
            )
        if all(side.format.bits == 8 and side.format.mantissa_bits == 2 for side in sides):
            raise ValueError(
                f"Gemm: {sides[0].format} x {sides[1].format} is refused: one operand needs 3 "
                "mantissa bits or more (XLA:GPU computes such a product in f16 silently)."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the matmuls of a layer are quantized. Hashable and static under jit.

    A layer computes ``fwd = lhs x rhs``, ``dgrad = output_grad x rhs`` and
    ``wgrad = lhs x output_grad``; each GEMM has quantizers of its own, or None for high precision.

    Attributes:
      name: name in the registry and in tables.
      fwd: how (lhs, rhs) are quantized.
      dgrad: how (output_grad, rhs) are quantized.
      wgrad: how (lhs, output_grad) are quantized; from the tensor as it is, never from other codes.
      scaling: where scales come from. "delayed": from the amax of earlier steps, kept as state, for
        one scale per tensor; "current": from the tensor itself.
      history_length: optimizer steps that delayed scaling looks back on.
      amax_reduction: "max" over the history, or the "most_recent" amax only.
      margin: powers of two of head-room in every f32 scale.
      scale_rounding: "none", or "power_of_two": scales that are not powers of two are rounded up to
        one (those of NVFP4 become E8M0 scales), so that scaling and unscaling change exponents only
        and what a format holds exactly stays exact.
      amax_scope: current scaling of an operand of which devices hold parts (`jax.shard_map`,
        `jax.pmap`): "global", its scale is that of the whole, so that results do not depend on the
        layout, at the price of a small all-reduce; "local", each part has a scale of its own.
        Where the compiler splits arrays (plain ``jit``) it is always global, and so are the amaxes
        of delayed scaling.
      backend: how the matmuls are executed, a name in `lowprec_jax.ops.BACKENDS`; None: as the
        platform that the program is lowered for does it best.
      observe: also record amax and health counts where the recipe has no need of state.
    """

    name: str
    fwd: Gemm | None = None
    dgrad: Gemm | None = None
    wgrad: Gemm | None = None
    scaling: Literal["delayed", "current"] = "current"
    history_length: int = 16
    amax_reduction: Literal["max", "most_recent"] = "max"
    margin: int = 0
    scale_rounding: Literal["none", "power_of_two"] = "none"
    amax_scope: Literal["global", "local"] = "global"
    backend: str | None = None
    observe: bool = False

    def __post_init__(self):
        if self.history_length < 1:
            raise ValueError(
                f"Recipe {self.name!r}: history_length is {self.history_length}; use 1 or more."
            )
        self._check_option("amax_reduction", "max", "most_recent")
        self._check_option("scaling", "delayed", "current")
        self._check_option("scale_rounding", "none", "power_of_two")
        self._check_option("amax_scope", "global", "local")
        self._check_quantizers()

    def _check_option(self, field: str, *allowed: str) -> None:
        given = getattr(self, field)
        if given not in allowed:
            options = " or ".join(map(repr, allowed))
            raise ValueError(f"Recipe {self.name!r}: {field} is {given!r}; use {options}.")

    @property
    def quantizes(self) -> bool:
        """Whether any GEMM is in low precision."""
        return any((self.fwd, self.dgrad, self.wgrad))

    @property
    def multiplies_codes(self) -> bool:
        """Whether any GEMM has both operands in low precision."""
        gemms = filter(None, (self.fwd, self.dgrad, self.wgrad))
        return any(gemm.left is not None and gemm.right is not None for gemm in gemms)

    @property
    def delayed(self) -> bool:
        """Whether scales come from state."""
        return self.quantizes and self.scaling == "delayed"

    @property
    def stochastic(self) -> bool:
        """Whether gradients are rounded stochastically, so that layers count their steps."""
        return any(q and q.rounding == "stochastic" for q in self.quantizers_of(Role.OUTPUT_GRAD))

    @property
    def stateful(self) -> bool:
        """Whether layers keep state: amax histories, step counters, or observations only."""
        return self.delayed or self.stochastic or (self.quantizes and self.observe)

    @property
    def window(self) -> int:
        """Length of the amax history that is kept: the most recent amax is a window of one."""
        return 1 if self.amax_reduction == "most_recent" else self.history_length

    def gemm(self, name: Literal["fwd", "dgrad", "wgrad"]) -> Gemm | None:
        """A GEMM with the margin and rounding of the recipe in its quantizers."""
        gemm = getattr(self, name)
        return gemm and Gemm(self._resolved(gemm.left), self._resolved(gemm.right))

    def quantizers_of(self, role: Role) -> tuple[Quantizer | None, Quantizer | None]:
        """The quantizers of a role in the two GEMMs that use it; None for high precision."""
        fwd, dgrad, wgrad = self.gemm("fwd"), self.gemm("dgrad"), self.gemm("wgrad")
        return {
            Role.LHS: (fwd and fwd.left, wgrad and wgrad.left),
            Role.RHS: (fwd and fwd.right, dgrad and dgrad.right),
            Role.OUTPUT_GRAD: (dgrad and dgrad.left, wgrad and wgrad.right),
        }[role]

    def quantizer_of(self, role: Role) -> Quantizer | None:
        """How a role is observed: as in the first GEMM that quantizes it."""
        first, second = self.quantizers_of(role)
        return first or second

    def formats_of(self, role: Role) -> tuple[Format | None, Format | None]:
        """The formats of a role in the two GEMMs that use it; None for high precision."""
        first, second = self.quantizers_of(role)
        return first and first.format, second and second.format

    def format_of(self, role: Role) -> Format | None:
        """The format in which a role is observed."""
        quantizer = self.quantizer_of(role)
        return quantizer and quantizer.format

    def scale(self, role: Role, amax: jax.Array) -> jax.Array:
        """The scale, f32, of operands of a role with these amaxes; 0 in high precision.

        With scales finer than the tensor it is the largest of them.
        """
        quantizer = self.quantizer_of(role)
        if quantizer is None:
            return jnp.zeros_like(amax)
        scale, whole = quantizer.scales(amax, amax)
        return scale if whole is None else scale * whole

    def _resolved(self, quantizer: Quantizer | None) -> Quantizer | None:
        if quantizer is None:
            return None
        powers = self.scale_rounding == "power_of_two"
        if quantizer.scale == "nvfp4" and powers:
            return dataclasses.replace(quantizer, scale="rceil", four_over_six=False)
        if quantizer.scale not in ("float", "power_of_two"):
            return quantizer
        return dataclasses.replace(
            quantizer,
            scale="power_of_two" if powers else quantizer.scale,
            margin=quantizer.margin + self.margin,
        )

    def _check_quantizers(self) -> None:
        for gemm in filter(None, (self.fwd, self.dgrad, self.wgrad)):
            for side in filter(None, (gemm.left, gemm.right)):
                if self.scaling == "delayed" and not side.per_tensor:
                    raise ValueError(
                        f"Recipe {self.name!r}: delayed scaling keeps one amax per tensor, but "
                        f"{side} has finer scales; use scaling='current'."
                    )
        for side in (
            self.fwd and self.fwd.left,
            self.fwd and self.fwd.right,
            self.dgrad and self.dgrad.right,
            self.wgrad and self.wgrad.left,
        ):
            if side is not None and side.rounding == "stochastic":
                raise ValueError(
                    f"Recipe {self.name!r}: stochastic rounding is for output gradients; in the "
                    "forward pass it adds variance and hurts (arXiv:2509.25149, section 4.4)."
                )
