"""Ends a process that makes no progress, and says where it hangs.

Public names: `Watchdog`, `EXIT_STALLED`.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

__all__ = ["EXIT_STALLED", "Watchdog"]

# Exit code of a process that the watchdog ended.
EXIT_STALLED = 6
# Seconds that writing the report may take; the disk may be what hangs.
_GRACE = 1.0
# Its number, as sys.stderr has a lock, which the thread that hangs may hold.
_STDERR = 2


class Watchdog:
    """Ends the process when nobody has called `beat` for too long.

    It then writes the Python stacks of all threads to stderr and to a file, says in a paragraph
    what stalled and where to look, and exits with `EXIT_STALLED`: a job that hangs costs as much as
    one that trains, and whoever started it can only resume what has ended.

    Two threads watch. One is Python's. The other is `faulthandler`'s, which needs no GIL: it ends
    the process, with exit code 1 and the stacks on stderr, where the first cannot run or cannot
    write. It uses `faulthandler.dump_traceback_later`, of which a process has one.

    Args:
      timeout_seconds: longest time between two beats; 0: nothing is watched.
      stacks_file: where the stacks go; its folder has to exist by then.
    """

    def __init__(self, timeout_seconds: float, stacks_file: Path):
        self._timeout, self._stacks_file = timeout_seconds, stacks_file
        self._paused = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self.beat("the start")

    def __enter__(self) -> Self:
        if self._timeout > 0:
            self.beat("the start")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, label: str) -> None:
        """Says that there was progress.

        Args:
          label: what has been reached, such as "step 12"; named if nothing follows it.
        """
        self._last = (time.monotonic(), label)

    @contextlib.contextmanager
    def paused(self, label: str) -> Iterator[None]:
        """Watches nothing during a ``with`` block that may take any time, such as a compilation.

        Args:
          label: of the beat at its end.
        """
        outer, self._paused = self._paused, True
        try:
            yield
        finally:
            self.beat(label)
            self._paused = outer

    def _watch(self) -> None:
        period = min(self._timeout / 4, 1.0)
        while not self._done.wait(period):
            if self._paused:
                faulthandler.cancel_dump_traceback_later()
                continue
            since, label = self._last
            left = self._timeout - (time.monotonic() - since)
            # Put off again and again, as long as this thread runs.
            patience = max(left, 0) + period + _GRACE
            faulthandler.dump_traceback_later(patience, exit=True, file=_STDERR)
            if left <= 0:
                self._end(label)

    def _end(self, label: str) -> None:
        text = _explanation(label, self._timeout, self._stacks_file)
        faulthandler.dump_traceback(_STDERR)
        with contextlib.suppress(OSError):
            os.write(_STDERR, text.encode())
        with contextlib.suppress(OSError), self._stacks_file.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file)
        os._exit(EXIT_STALLED)


def _explanation(label: str, timeout: float, stacks_file: Path) -> str:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return (
        f"\n{now} Stalled: no progress for {timeout:g} s (stall_timeout) since {label}. The stacks "
        f"of all threads are above and in {stacks_file}. Look at the main thread: where it reads a "
        "batch, the data does not come (disk, network); where it waits for an array, a device or "
        "another process of the run hangs; where it compiles or saves, that may only be slow: give "
        f"stall_timeout more seconds. This process ends with exit code {EXIT_STALLED}; --resume "
        "True goes on from the newest checkpoint.\n"
    )
