"""A run at Weights & Biases, for those who have it installed. Public names: `WandbRun`."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowprec_jax.errors import UserError

__all__ = ["WandbRun", "require_wandb"]


def require_wandb(project: str) -> None:
    """Refuses a run that asks for Weights & Biases where it is not installed.

    For the first moments of a run, so that nobody learns it after an hour of training.

    Args:
      project: `TrainConfig.wandb`; empty: not asked for.

    Raises:
      UserError: it is asked for and missing.
    """
    if project and not _is_installed():
        raise UserError(
            f"wandb {project!r} asks for Weights & Biases, which is not installed. Run "
            '"pip install wandb", or leave the option empty: metrics.jsonl and TensorBoard have '
            "the same numbers."
        )


def _is_installed() -> bool:
    # The folder "wandb" that its runs leave can be imported too, as an empty package.
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


class WandbRun:
    """Sends numbers to Weights & Biases; a resumed run goes on as the same run there.

    Args:
      project: name of the project.
      name: name of the run.
      folder: the run directory; the id of the run is kept in its ``wandb_id.txt``.
      config: shown with the run.

    Raises:
      UserError: it is not installed, or refuses the run: no account, no network.
    """

    def __init__(self, project: str, *, name: str, folder: Path, config: Mapping[str, Any]):
        require_wandb(project)
        import wandb  # pyright: ignore[reportMissingImports]

        kept = folder / "wandb_id.txt"
        known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(folder),
                config=dict(config),
                id=known,
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases refuses the run: {error} Log in with `wandb login`, set "
                "WANDB_MODE=offline to send it later, or leave the option wandb empty."
            ) from error
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")
        # Its own count of steps can only rise, but a rollback goes back.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Sends what is left and ends the run."""
        self._run.finish()
