"""Which recipe which layers follow, and when. Imports no JAX.

Names of recipes and chips are checked later, by their registries. Public names: `PrecisionConfig`,
`PhaseConfig`, `RuleConfig`.
"""

import dataclasses
import re
from typing import Literal

from lowprec_jax.training.config_checks import require, require_at_least, require_between


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Gives the layers whose path matches another recipe."""

    path: str
    """Regular expression for the whole path of a layer, its parts joined by '/'."""
    recipe: str
    """Recipe of the layers that match."""

    def __post_init__(self) -> None:
        require(self.recipe != "", "recipe is empty; give the name of a recipe.")
        try:
            re.compile(self.path)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"path {self.path!r} is not a regular expression: {error}. Write '.*' for any text."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """From a step on, other recipes; exactly one of `step` and `fraction` says from when."""

    step: int | None = None
    """Completed steps after which the phase begins."""
    fraction: float | None = None
    """The same as a part of all steps, rounded."""
    recipe: str | None = None
    """Recipe of every layer that no rule names; None: that of the run."""
    rules: tuple[RuleConfig, ...] | None = None
    """Rules of the phase in place of those of the run; None: those of the run."""

    def __post_init__(self) -> None:
        require(
            (self.step is None) != (self.fraction is None),
            f"step is {self.step} and fraction is {self.fraction}; give exactly one of them.",
        )
        if self.step is not None:
            require_at_least("step", self.step, 1)
        if self.fraction is not None:
            require_between("fraction", self.fraction, 0, 1, open_low=True)
        require(self.recipe != "", "recipe is empty; give the name of a recipe.")
        require(
            self.recipe is not None or self.rules is not None,
            "a phase changes nothing; give it a recipe, or rules.",
        )

    def begin(self, steps: int) -> int:
        """Completed steps after which the phase begins in a run of `steps`."""
        return round((self.fraction or 0.0) * steps) if self.step is None else self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Which recipe the matrix products follow."""

    recipe: str = "fp8_delayed"
    """Recipe of every layer that no rule names; "none" trains without FP8."""
    rules: tuple[RuleConfig, ...] = ()
    """Rules that come before the defaults; the first that matches decides."""
    phases: tuple[PhaseConfig, ...] = ()
    """Later parts of the run in other precision, in order; each lasts until the next."""
    history_length: int = 16
    """Steps that a delayed scale looks back."""
    margin: int = 0
    """Powers of two of head-room in a scale."""
    amax_reduction: Literal["max", "most_recent"] = "max"
    """A delayed scale follows the largest, or the most recent amax of its history."""
    scale_rounding: Literal["none", "power_of_two"] = "none"
    """Round scales up to powers of two."""
    amax_scope: Literal["global", "local"] = "global"
    """Current scaling of an array that devices share: one scale, or one for each part."""
    target: str | None = None
    """Chip whose formats are used, such as "amd-mi300"; None: the formats of the recipes."""

    backend: str | None = None
    """How low-precision matmuls are executed: "native", "upcast", "block_scaled", or the studies
    "truncated" and "promoted"; None: as the device does it best."""

    def __post_init__(self) -> None:
        require(self.recipe != "", "recipe is empty; give the name of a recipe.")
        require(self.backend != "", "backend is empty; give the name of one, or null for none.")
        require(self.target != "", "target is empty; give the name of a chip, or null for none.")
        require_between("history_length", self.history_length, 1, 2**16, closed_high=True)
        require_between("margin", self.margin, 0, 128)  # float32 ends at 2**128
