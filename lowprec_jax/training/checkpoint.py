"""Checkpoints with Orbax: the whole training state, so that a run goes on as if never stopped."""

from pathlib import Path
from typing import Any

import jax

from lowprec_jax.errors import UserError
from lowprec_jax.training.step import TrainState

FORMAT_VERSION = 2


class Checkpoints:
    """The checkpoints of one run directory; the newest are kept. Use as a context manager.

    Batches are a function of the step, so that the step is the whole data cursor.

    Args:
      directory: where they are, ``<run>/checkpoints``.
      keep: how many stay.
    """

    def __init__(self, directory: Path, keep: int):
        import orbax.checkpoint as ocp  # slow to import

        self._ocp = ocp
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "about": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint of the step that `state` has completed, in the background."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        ocp = self._ocp
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                about=ocp.args.JsonSave({"format_version": FORMAT_VERSION}),
            ),
        )

    def restore_latest(self, like: TrainState) -> TrainState:
        """Reads the newest checkpoint.

        Args:
          like: a state of the same structure, on the devices it is read to; its values are not
            used.

        Raises:
          UserError: there is none, or it is of a run with another model, recipe or optimizer.
        """
        step = self._manager.latest_step()
        if step is None:
            raise UserError(
                f"No checkpoint to resume from in {self._directory}. Give the run_dir of a run "
                f"that has one, or delete {self._directory.parent} and start without --resume."
            )
        ocp = self._ocp
        self._check_format(step)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
        )
        self._check_structure(step, abstract)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        return TrainState(**restored["state"])

    def _check_structure(self, step: int, abstract: Any) -> None:
        """Compares names, shapes and types before anything is read."""
        stored = _leaves(self._manager.item_metadata(step)["state"])
        expected = _leaves(abstract)
        # Parameters first: a difference in the model shows in the optimizer's state too.
        names = sorted({*stored, *expected}, key=lambda n: (not n.startswith("params"), n))
        for name in names:
            there, here = stored.get(name, "missing"), expected.get(name, "missing")
            if there != here:
                raise UserError(
                    f"The checkpoint of step {step} in {self._directory} does not fit this run: "
                    f"{name} is {there} there and {here} here. Resume with the model, recipe and "
                    "optimizer it was made with (see config.yaml beside it)."
                )

    def _check_format(self, step: int) -> None:
        ocp = self._ocp
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        version = about["about"]["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"The checkpoint of step {step} in {self._directory} has format {version}; this "
                f"version of lowprec_jax reads format {FORMAT_VERSION}. Resume with the version "
                "that wrote it (see environment.json beside it)."
            )


def _leaves(tree: Any) -> dict[str, str]:
    """``{path: "float32[3, 4]"}`` of a tree of arrays, of their metadata or abstract values."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in flat
        if hasattr(leaf, "shape")
    }
