"""What may differ when a run is resumed. Imports no JAX.

Public names: `Changes`, `changes`, `refuse_changes`.
"""

import re
from typing import Any, NamedTuple

from lowprec_jax.config_text import config_to_dict
from lowprec_jax.errors import UserError
from lowprec_jax.training.config import TrainConfig

__all__ = ["Changes", "changes", "refuse_changes"]

# Options that say where, how often and what is reported. The others decide the result; of them
# these may change without being asked: a longer run, other devices, another patience.
_REPORTING = re.compile(
    r"name|run_dir|resume|allow_changes|log_every|keep_checkpoints|keep_best|checkpoint_every"
    r"|sample_\w+|plots|progress|profile_\w+|wandb|stall_timeout|health\..*|distributed\..*"
)
_ALLOWED = re.compile(r"steps|eval_every|eval_windows|early_stopping|mesh\..*|guard\..*")


class Changes(NamedTuple):
    """Options that differ, as ``"optim.learning_rate: 0.001, now 0.002"``.

    Attributes:
      said: may change; somebody who reads the curves wants to know.
      decisive: decide what is learned; refused unless asked for.
    """

    said: list[str]
    decisive: list[str]


def changes(before: dict[str, Any], config: TrainConfig) -> Changes:
    """Compares the config of a checkpoint with that of the run that goes on from it.

    An option that the checkpoint does not know, since it is older, had its default.

    Args:
      before: `lowprec_jax.config_text.config_to_dict` of the config of the checkpoint.
      config: that of the run.
    """
    defaults = _flat(config_to_dict(TrainConfig()))
    old, new = defaults | _flat(before), _flat(config_to_dict(config))
    said, decisive = [], []
    for name in sorted({*old, *new}):
        there, here = old.get(name, "not set"), new.get(name, "not set")
        if there != here and not _REPORTING.fullmatch(name):
            kept = said if _ALLOWED.fullmatch(name) else decisive
            kept.append(f"{name}: {there}, now {here}")
    return Changes(said, decisive)


def refuse_changes(before: dict[str, Any], config: TrainConfig) -> list[str]:
    """The changes of a resumed config, for the log.

    Raises:
      UserError: one of them decides what is learned, and `allow_changes` is not set.
    """
    found = changes(before, config)
    if found.decisive and not config.allow_changes:
        raise UserError(
            f"The run in {config.run_path} was made with other options: "
            f"{'; '.join(found.decisive)}. Give what it had (see its config.yaml), or "
            "--allow_changes True to go on with the new ones."
        )
    return found.decisive + found.said


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """``{"optim.b1": 0.9}`` of nested dicts; lists are compared whole."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: value
        for key, inner in values.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }
