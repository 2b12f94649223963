"""The optimizer of a run and its schedule. Imports no JAX. Public name: `OptimConfig`."""

import dataclasses
from typing import Literal, get_args

from lowprec_jax.training.config_checks import (
    require,
    require_at_least,
    require_between,
    require_positive,
)

OptimizerName = Literal["adamw", "lion", "sgd", "adafactor", "muon"]
ScheduleName = Literal["cosine", "linear", "wsd", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, after a linear warmup on a schedule."""

    optimizer: OptimizerName = "adamw"
    """Lion wants a learning rate 3 to 10 times smaller; muon takes the matrices of the blocks and
    leaves the rest to AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    base_width: int | None = None
    """model.width at which learning_rate was found: matrices of the blocks get learning_rate *
    sqrt(base_width / model.width), for unit-scaled models; None: learning_rate."""
    schedule: ScheduleName = "cosine"
    """After the warmup: decay over all steps (cosine, linear), over the last ones (wsd: warmup,
    stable, decay), or none."""
    warmup_steps: int = 100
    """Steps of the linear warmup from zero."""
    decay_fraction: float = 0.2
    """Part of the steps that a wsd schedule decays in."""
    final_fraction: float = 0.1
    """The decay ends at this fraction of the peak."""
    b1: float = 0.9
    """Decay of the gradient average; the momentum of sgd and muon."""
    b2: float = 0.99
    """Decay of the squared gradient average; of the average of lion."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    ema_decay: float = 0.0
    """Decay of an average of the weights that is evaluated and sampled in their place; 0: none."""
    accumulate: int = 1
    """Micro-batches of a step; their gradients are averaged."""

    def __post_init__(self) -> None:
        for name, kind in (("optimizer", OptimizerName), ("schedule", ScheduleName)):
            options = get_args(kind)
            require(
                getattr(self, name) in options,
                f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, options))}.",
            )
        for name in ("learning_rate", "clip_norm"):
            require_positive(name, getattr(self, name))
        require_at_least("warmup_steps", self.warmup_steps, 0)
        require_at_least("accumulate", self.accumulate, 1)
        if self.base_width is not None:
            require_at_least("base_width", self.base_width, 1)
        require_between("final_fraction", self.final_fraction, 0, 1, closed_high=True)
        require_between(
            "decay_fraction", self.decay_fraction, 0, 1, open_low=True, closed_high=True
        )
        for name in ("b1", "b2", "ema_decay"):
            require_between(name, getattr(self, name), 0, 1)
        if self.weight_decay != 0:
            require_positive("weight_decay", self.weight_decay)
