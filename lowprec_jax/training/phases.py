"""Which precision is in force at a step: the phase of the config, and layers promoted for a while.

Public name: `precision_at`.
"""

import dataclasses
import re
from collections.abc import Collection

from lowprec_jax.training.config import PrecisionConfig, RuleConfig, TrainConfig

__all__ = ["precision_at"]


def precision_at(
    config: TrainConfig, completed: int, promoted: Collection[str] = ()
) -> PrecisionConfig:
    """The precision of the step after `completed` ones, without phases.

    Equal configs are equal programs: a phase that returns to an earlier precision needs no new
    one.

    Args:
      config: the run.
      completed: completed steps.
      promoted: paths of layers that are in high precision for now, whatever the rules say.
    """
    precision = config.precision
    for phase in precision.phases:
        if phase.begin(config.steps) <= completed:
            precision = dataclasses.replace(
                config.precision,
                recipe=config.precision.recipe if phase.recipe is None else phase.recipe,
                rules=config.precision.rules if phase.rules is None else phase.rules,
            )
    high = tuple(RuleConfig(path=re.escape(path), recipe="none") for path in sorted(promoted))
    return dataclasses.replace(precision, rules=(*high, *precision.rules), phases=())
