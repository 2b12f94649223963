"""What is watched while a run trains, and what is done about it. Imports no JAX.

Public names: `GuardConfig`, `HealthConfig`.
"""

import dataclasses

from lowprec_jax.training.config_checks import (
    require,
    require_at_least,
    require_between,
    require_positive,
)

MAX_WINDOW = 2**16  # losses that every checkpoint holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Skip, roll back, stop: what happens when a step goes wrong."""

    max_skipped: int = 5
    """Non-finite updates, which are never applied, without a sound step between them before a
    rollback."""
    sigma: float = 6.0
    """A loss this many deviations (1.48 median absolute ones) above the median of the last ones is
    a spike; the deviation counts as 1/256 of the median, and of 1 nat, at least."""
    window: int = 128
    """Losses that a spike is measured against, only sound ones; also the steps beyond a failure at
    which a checkpoint forgives the rollbacks."""
    min_window: int = 64
    """Losses that must be known before one can be a spike."""
    max_spikes: int = 2
    """Spikes without a sound step between them before a rollback."""
    max_rollbacks: int = 3
    """Rollbacks without progress before the run stops with a report; 0: stop at the first."""
    promote_steps: int = 0
    """Steps for which a rollback trains the layers it suspects in high precision, longer if they
    are suspected again; 0: none."""

    def __post_init__(self) -> None:
        for name in ("max_skipped", "max_spikes"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("max_rollbacks", "promote_steps"):
            require_at_least(name, getattr(self, name), 0)
        require_positive("sigma", self.sigma)
        require_at_least("min_window", self.min_window, 2)
        require(
            self.min_window <= self.window <= MAX_WINDOW,
            f"window is {self.window}; allowed: min_window {self.min_window} to {MAX_WINDOW}.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Reports on every quantized operand, and alarms."""

    every: int = 25
    """Steps between reports of all operands; 0: none."""
    saturated: float = 0.002
    """Alarm above this fraction of clipped elements."""
    underflow: float = 0.1
    """Alarm above this fraction of elements that rounded to zero."""
    scale_age: int = 100
    """Alarm above this many steps without a change of the scale."""
    sqnr_every: int = 0
    """Steps between comparisons of all gradients with those in high precision; 0: none."""

    def __post_init__(self) -> None:
        for name in ("every", "sqnr_every"):
            require_at_least(name, getattr(self, name), 0)
        for name in ("saturated", "underflow"):
            require_between(name, getattr(self, name), 0, 1, open_low=True, closed_high=True)
        require_at_least("scale_age", self.scale_age, 1)
