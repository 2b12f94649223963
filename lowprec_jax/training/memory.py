"""What decides how a run goes on, beside its arrays. Public name: `Memory`."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from lowprec_jax.config_text import config_to_dict
from lowprec_jax.training.alarms import Alarms
from lowprec_jax.training.config import TrainConfig
from lowprec_jax.training.guard import Guard
from lowprec_jax.training.promotion import Promotion

__all__ = ["Memory"]


class Memory:
    """Kept in the manifest of every checkpoint.

    Args:
      config: the run.

    Attributes:
      next_batch: number of the next batch; equal to the completed steps until a rollback.
      validation_losses: of all evaluations.
      guard: what is done about steps that go wrong.
      alarms: those that are on.
      promotion: layers that are in high precision for a while.
    """

    def __init__(self, config: TrainConfig):
        self._config = config
        self.next_batch = 0
        self.validation_losses: list[float] = []
        self.guard, self.alarms = Guard(config.guard), Alarms(config.health)
        self.promotion = Promotion(config.guard.promote_steps)

    @property
    def patience_is_over(self) -> bool:
        """Whether `early_stopping` evaluations in a row brought no new best loss."""
        patience, losses = self._config.early_stopping, self.validation_losses
        return patience > 0 and len(losses) - 1 - int(np.argmin(losses or [0.0])) >= patience

    def state(self) -> dict[str, Any]:
        """What `restore` needs, and the config, as JSON."""
        return {
            "config": config_to_dict(self._config),
            "next_batch": self.next_batch,
            "validation_losses": self.validation_losses,
            "guard": self.guard.state(),
            "alarms": self.alarms.state(),
            "promotion": self.promotion.state(),
        }

    @classmethod
    def restore(cls, config: TrainConfig, state: Mapping[str, Any]) -> Self:
        """The memory of a checkpoint, in a run whose limits may be others."""
        memory = cls(config)
        memory.next_batch = state["next_batch"]
        memory.validation_losses = list(state["validation_losses"])
        memory.guard = Guard.restore(config.guard, state["guard"])
        memory.alarms = Alarms.restore(config.health, state["alarms"])
        memory.promotion = Promotion.restore(config.guard.promote_steps, state["promotion"])
        return memory
