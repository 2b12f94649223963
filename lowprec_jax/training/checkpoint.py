"""Checkpoints with Orbax, verified before they count and again before they are used.

    checkpoints/<step>/state/         the arrays, written by Orbax in the background
    checkpoints/<step>/manifest.json  written last: see `lowprec_jax.training.manifest`

A save becomes a checkpoint in four steps: Orbax has written all arrays; they are read back; their
bits are those that were on the devices, all finite; the manifest is written. Until then the older
ones stay, so that a run killed at any instant has one. Public names: `Checkpoints`, `Found`.
"""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lowprec_jax.errors import UserError
from lowprec_jax.training.fingerprint import fingerprint, fingerprints
from lowprec_jax.training.manifest import NAME, ArrayRecord, DamagedError, Manifest, digests
from lowprec_jax.training.state_leaves import Leaves, kind, leaves_of

__all__ = ["Checkpoints", "Found"]


class Found(NamedTuple):
    """The newest checkpoint that can be used.

    Attributes:
      folder: where it is.
      manifest: what it holds.
      damaged: what is wrong with newer ones, a sentence each.
    """

    folder: Path
    manifest: Manifest
    damaged: list[str]


class Checkpoints:
    """The checkpoints of one run directory. Use as a context manager.

    Of several processes each writes its part of the arrays; the first verifies, publishes and
    deletes. It holds one whole state in host memory while it verifies.

    Args:
      directory: where they are, ``<run>/checkpoints``.
      keep: how many of the newest stay.
      keep_best: the one with the lowest validation loss stays too.
      writes: whether this is the first process.
    """

    def __init__(self, directory: Path, *, keep: int, keep_best: bool = True, writes: bool = True):
        import orbax.checkpoint as ocp  # slow to import

        self._ocp = ocp
        self._directory = directory.absolute()
        self._keep, self._keep_best, self._writes = keep, keep_best, writes
        # In the background, a folder that cannot be made leaves threads that wait for ten minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.StandardCheckpointer(async_options=options)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._publishing: Future[None] | None = None
        self._saved: set[int] = set()  # steps that this process has written or read

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def save(
        self, state: Any, about: dict[str, Any], *, validation_loss: float | None = None
    ) -> None:
        """Writes a checkpoint of the step that `state` has completed, in the background.

        Args:
          state: the training state; its arrays may be donated after the call.
          about: see `Manifest`.
          validation_loss: see `Manifest`.

        Raises:
          UserError: this or the save before could not be written or verified.
        """
        self.wait()
        step = int(state.step)
        if step in self._saved:
            return
        arrays = leaves_of(state)
        expected = fingerprints(arrays)
        folder = self._directory / str(step)
        try:
            if self._writes:
                _delete(folder)  # a damaged one, or what a kill left
                folder.mkdir(parents=True)
            self._checkpointer.save(folder / "state", arrays)
        except Exception as error:
            raise self._failure(step, error) from error
        records = {name: (kind(x), expected[name]) for name, x in arrays.items()}
        self._publishing = self._thread.submit(
            self._publish, folder, step, about, validation_loss, records
        )
        self._saved.add(step)

    def wait(self) -> None:
        """Waits until the newest save is a checkpoint; raises as `save` if it cannot be."""
        if self._publishing is not None:
            publishing, self._publishing = self._publishing, None
            publishing.result()

    def check(self) -> None:
        """Raises as `save`, if what runs in the background has failed; never waits."""
        if self._publishing is not None and self._publishing.done():
            self.wait()

    def newest(self, *, skip: int = 0) -> Found | None:
        """The newest checkpoint whose files are what was written; None if there is none.

        Several processes call it together and take what the first one finds.

        Args:
          skip: how many good ones to pass over.

        Raises:
          UserError: there are checkpoints, but all are damaged.
        """
        self.wait()
        if jax.process_count() == 1:
            return self._newest(skip)
        from jax.experimental import multihost_utils

        found, failure = None, None
        if self._writes:
            try:
                found = self._newest(skip)
            except UserError as error:
                failure = error
        mine = -2 if failure else found.manifest.step if found else -1
        step = int(multihost_utils.broadcast_one_to_all(np.int32(mine)))
        if step == -2:
            raise failure or UserError("Process 0 found no checkpoint that can be used.")
        if self._writes or step == -1:
            return found
        folder = self._directory / str(step)
        return Found(folder, Manifest.read(folder), [])

    def _newest(self, skip: int) -> Found | None:
        damaged: list[str] = []
        passed_over = 0
        for step in sorted(self._steps(), reverse=True):
            folder = self._directory / str(step)
            try:
                manifest = Manifest.read(folder)
                manifest.check_files(folder)
            except DamagedError as problem:
                damaged.append(f"The checkpoint of step {step} is damaged: {problem}.")
                continue
            if passed_over == skip:
                return Found(folder, manifest, damaged)
            passed_over += 1
        if damaged and not passed_over:
            raise UserError(
                f"No checkpoint in {self._directory} can be used. {' '.join(damaged)} Restore one "
                f"from a backup, or delete {self._directory.parent} and start without --resume."
            )
        return None

    def read(self, found: Found, like: Leaves) -> Leaves:
        """Reads arrays of a checkpoint onto the devices, and checks that their bits are right.

        Args:
          found: from `newest`.
          like: for the arrays that are wanted, abstract ones as they are stored; their shardings
            are where they are put.

        Raises:
          UserError: an array is not what it was when it was saved.
        """
        args = self._ocp.args.PyTreeRestore(
            item=dict(like),
            restore_args=self._ocp.checkpoint_utils.construct_restore_args(dict(like)),
            partial_restore=True,
        )
        with self._ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(found.folder / "state", args=args)
        actual = jax.device_get(fingerprints(arrays))
        for name, value in actual.items():
            if int(value) != found.manifest.arrays[name].fingerprint:
                raise UserError(
                    f"{name} of the checkpoint in {found.folder} was not read as it was saved, "
                    "although the files are intact. Delete that folder to use the one before."
                )
        self._saved.add(found.manifest.step)
        return arrays

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which a rollback or a damaged one made void."""
        self.wait()
        self._saved = {s for s in self._saved if s <= step}
        if self._writes:
            for later in [s for s in self._steps() if s > step]:
                _delete(self._directory / str(later))

    def _publish(
        self,
        folder: Path,
        step: int,
        about: dict[str, Any],
        validation_loss: float | None,
        records: dict[str, tuple[str, jax.Array]],
    ) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if not self._writes:
                return
            arrays = {name: ArrayRecord(k, int(print_)) for name, (k, print_) in records.items()}
            self._verify(folder / "state", arrays)
            Manifest(
                step=step,
                about=about,
                validation_loss=validation_loss,
                arrays=arrays,
                files=digests(folder),
            ).write(folder)
            self._prune()
        except Exception as error:
            raise self._failure(step, error) from error

    def _verify(self, folder: Path, arrays: dict[str, ArrayRecord]) -> None:
        """Reads all arrays back; all must have the bits they had, and be finite."""
        args = {name: self._ocp.RestoreArgs(restore_type=np.ndarray) for name in arrays}
        alone = self._ocp.options.MultiprocessingOptions(
            active_processes={jax.process_index()}, barrier_sync_key_prefix="verify"
        )
        handler = self._ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with self._ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            stored = checkpointer.restore(folder, restore_args=args)
        for name, record in arrays.items():
            if fingerprint(stored[name]) != record.fingerprint:
                raise DamagedError(f"{name} was not read back as it was written")
            if not np.isfinite(np.asarray(stored[name], np.float32)).all():
                raise DamagedError(f"{name} is not finite")

    def _steps(self) -> list[int]:
        """The steps of folders with a manifest, good or not."""
        found = self._directory.glob(f"*/{NAME}")
        return [int(path.parent.name) for path in found if path.parent.name.isdigit()]

    def _prune(self) -> None:
        """Deletes what is neither among the newest nor the best, and what a kill left."""
        losses: dict[int, float | None] = {}
        for step in sorted(self._steps()):
            try:
                losses[step] = Manifest.read(self._directory / str(step)).validation_loss
            except DamagedError:
                continue
        kept = set(list(losses)[-self._keep :])
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        if self._keep_best and measured:
            kept.add(min(measured, key=measured.__getitem__))
        for folder in self._directory.iterdir():
            if not (folder.name.isdigit() and int(folder.name) in kept):
                _delete(folder)

    def _failure(self, step: int, error: Exception) -> UserError:
        good = sorted(self._steps())
        rest = (
            f"The newest one is of step {good[-1]}: --resume True goes on from there"
            if good
            else "There is no older one"
        )
        return UserError(
            f"The checkpoint of step {step} could not be made in {self._directory}: {error}. "
            f"{rest}."
        )


def _delete(folder: Path) -> None:
    """Deletes a checkpoint; its manifest first, so that half of one never passes for one."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
