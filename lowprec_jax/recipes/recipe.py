"""What a recipe is: the formats of the three GEMMs of a layer and where their scales come from."""

import dataclasses
import enum
from typing import Literal

import jax

from lowprec_jax.numerics import Format, round_up_to_power_of_two, scale_from_amax


class Role(enum.IntEnum):
    """Which operand of a layer a tensor is; also its row in scaling state and observations."""

    LHS = 0
    RHS = 1
    OUTPUT_GRAD = 2


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Formats of the two operands of one low-precision matmul.

    Raises:
      ValueError: a format that cannot be multiplied, or two operands with two mantissa bits (no
        hardware multiplies e5m2 by e5m2; XLA falls back to f16 without a word).
    """

    left: Format
    right: Format

    def __post_init__(self):
        for fmt in (self.left, self.right):
            if not (fmt.element and fmt.is_low_precision):
                raise ValueError(
                    f"Gemm: {fmt} is no low-precision element format; leave the GEMM None to "
                    "compute it in high precision."
                )
        if max(self.left.mantissa_bits, self.right.mantissa_bits) < 3:
            raise ValueError(
                f"Gemm: {self.left} x {self.right} is refused: one operand needs 3 mantissa bits "
                "or more (XLA:GPU computes such a product in f16 silently)."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the matmuls of a layer are quantized. Hashable and static under jit.

    A layer computes ``fwd = lhs x rhs``, ``dgrad = output_grad x rhs`` and
    ``wgrad = lhs x output_grad``; each GEMM has formats of its own, or None for high precision.

    Attributes:
      name: name in the registry and in tables.
      fwd: formats of (lhs, rhs).
      dgrad: formats of (output_grad, rhs).
      wgrad: formats of (lhs, output_grad).
      scaling: where scales come from. "delayed": from the amax of earlier steps, kept as state;
        "current": from the tensor itself.
      history_length: optimizer steps that delayed scaling looks back on.
      amax_reduction: "max" over the history, or the "most_recent" amax only.
      margin: powers of two of head-room in every scale.
      scale_rounding: "none", or "power_of_two": scales are rounded up to one, so that scaling and
        unscaling change exponents only and what a format holds exactly stays exact.
      amax_scope: current scaling of an operand of which devices hold parts (`jax.shard_map`,
        `jax.pmap`): "global", its scale is that of the whole, so that results do not depend on the
        layout, at the price of a small all-reduce; "local", each part has a scale of its own.
        Where the compiler splits arrays (plain ``jit``) it is always global, and so are the amaxes
        of delayed scaling.
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

    def _check_option(self, field: str, *allowed: str) -> None:
        given = getattr(self, field)
        if given not in allowed:
            options = " or ".join(map(repr, allowed))
            raise ValueError(f"Recipe {self.name!r}: {field} is {given!r}; use {options}.")

    def scale(self, amax: jax.Array, fmt: Format) -> jax.Array:
        """The scale, f32, of a tensor with this amax in one of the recipe's formats."""
        scale = scale_from_amax(amax, fmt, margin=self.margin)
        return round_up_to_power_of_two(scale) if self.scale_rounding == "power_of_two" else scale

    @property
    def quantizes(self) -> bool:
        """Whether any GEMM is in low precision."""
        return any((self.fwd, self.dgrad, self.wgrad))

    @property
    def delayed(self) -> bool:
        """Whether scales come from state."""
        return self.quantizes and self.scaling == "delayed"

    @property
    def stateful(self) -> bool:
        """Whether layers keep state: amax histories, or observations only."""
        return self.delayed or (self.quantizes and self.observe)

    @property
    def window(self) -> int:
        """Length of the amax history that is kept: the most recent amax is a window of one."""
        return 1 if self.amax_reduction == "most_recent" else self.history_length

    def formats_of(self, role: Role) -> tuple[Format | None, Format | None]:
        """The formats of a role in the two GEMMs that use it; None where that is high precision."""
        fwd, dgrad, wgrad = self.fwd, self.dgrad, self.wgrad
        return {
            Role.LHS: (fwd and fwd.left, wgrad and wgrad.left),
            Role.RHS: (fwd and fwd.right, dgrad and dgrad.right),
            Role.OUTPUT_GRAD: (dgrad and dgrad.left, wgrad and wgrad.right),
        }[role]

    def format_of(self, role: Role) -> Format | None:
        """The format in which a role is observed: that of the first GEMM that quantizes it."""
        first, second = self.formats_of(role)
        return first or second
