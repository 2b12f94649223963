"""SIGTERM and Ctrl-C end a run after the step in progress, with a checkpoint.

Public names: `StopRequest`, `EXIT_STOPPED`.
"""

import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
import numpy as np

__all__ = ["EXIT_STOPPED", "StopRequest"]

# Exit code of a run that was stopped by a signal and can be resumed.
EXIT_STOPPED = 4
# Steps between the questions whether any of several processes got a signal.
_ASK_EVERY = 10


class StopRequest:
    """Remembers the first SIGTERM or SIGINT; a second one ends the process as usual.

    Checkpoints are published whole or not at all, so that a second signal costs the newest only.
    Use as a context manager; outside of the main thread, where Python allows no handlers, it never
    asks to stop.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    @property
    def name(self) -> str:
        """The signal that came."""
        return self._signal.name if self._signal else "another process"

    @property
    def here(self) -> bool:
        """Whether a signal came, where this is the only process and may act on it alone."""
        return self._signal is not None and jax.process_count() == 1

    def agreed(self, step: int) -> bool:
        """Whether to stop before this step; several processes agree on it, every ten steps."""
        mine = self._signal is not None
        if jax.process_count() == 1:
            return mine
        if step % _ASK_EVERY:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(mine)).any())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
