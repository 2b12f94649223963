"""A profile of a few steps. Public name: `ProfileWindow`."""

import contextlib
from pathlib import Path
from typing import Any, Self

import jax

__all__ = ["ProfileWindow"]


class ProfileWindow:
    """Records steps ``start + 1`` to ``start + steps`` with JAX's profiler, once.

    TensorBoard (with its profile plugin) shows the folder; Perfetto (ui.perfetto.dev) opens the
    ``*.trace.json.gz`` in it. As a context manager it also ends a trace that the run ends inside.

    Args:
      start: steps before the first that is recorded. The first steps of a process are slower; leave
        some out.
      steps: number of steps; 0: nothing is recorded.
      folder: where the trace goes; made if it does not exist.
    """

    def __init__(self, start: int, steps: int, folder: Path):
        self._recorded = range(start + 1, start + steps + 1)
        self._folder = folder
        self._running = self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._running:
            self._stop()

    def step(self, step: int, state: Any) -> contextlib.AbstractContextManager[Any]:
        """Call before every step; what runs in its ``with`` block is marked as this step.

        Where a trace begins or ends it waits for the device, so that the trace holds its steps
        whole and no other.

        Args:
          step: number of the step that follows.
          state: what the step before returned, arrays in any nesting.
        """
        if step in self._recorded and not self._done:
            if not self._running:
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(self._folder))
                self._running = True
            return jax.profiler.StepTraceAnnotation("train", step_num=step)
        if self._running:
            jax.block_until_ready(state)
            self._stop()
        return contextlib.nullcontext()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._done = False, True
