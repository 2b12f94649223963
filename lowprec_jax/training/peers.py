"""Connections between the processes of a run: they meet, then notice when one ends too early.

JAX's own service ends a process from C++ when a peer is missing (SIGABRT, a stack trace, no word
of who). So the processes first meet here, over plain TCP: process 0 listens, the others connect,
and the connections stay open. When a process dies its kernel closes them, and the others know
within milliseconds; TCP keepalive finds a host that is gone. A process that hangs is left to the
heartbeats of JAX. Imports no JAX. Public names: `Peers`, `meet`.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from lowprec_jax.errors import UserError
from lowprec_jax.training.message_line import MessageLine, free_port, listen
from lowprec_jax.training.process_settings import DistributedConfig, ProcessSettings

__all__ = ["Peers", "meet"]

_GREETING_SECONDS = 5.0
_BLAME_SECONDS = 1.0
_RETRY_SECONDS = 0.1


class Peers:
    """Open lines to the others: of process 0 to all, of another to process 0.

    Args:
      index: this process.
      lines: by the index of the process at the other end.
    """

    def __init__(self, index: int, lines: dict[int, MessageLine]):
        self._index, self._lines = index, lines
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._failing = self._leaving = False

    def watch(self, on_end: Callable[[int, bool], None]) -> None:
        """Calls ``on_end(process, failed)`` once, in a thread, when a process ends too early.

        `failed`: it said that it failed, and waits for the others to leave. Otherwise its
        connection broke.
        """
        for peer in self._lines:
            thread = threading.Thread(target=self._listen, args=(peer, on_end), daemon=True)
            self._threads.append(thread)
            thread.start()

    def finish(self) -> None:
        """Tells the others that this process is done, and waits until all are.

        However long they take: the watch goes on meanwhile.
        """
        if self._index != 0:
            self._tell({"done": True})
        for thread in self._threads:
            thread.join()
        if self._index == 0:  # only now, so that the others watch until the last is done
            self._tell({"done": True})
        self.close()

    def fail(self) -> None:
        """Tells the others that this process failed.

        Waits a moment first: when a peer dies, the collectives of this process fail as well, and
        the peer is then the better reason.
        """
        self._failing = True
        time.sleep(_BLAME_SECONDS)
        if self._first_to_leave():
            self._tell({"ended": self._index, "failed": True})

    def close(self) -> None:
        """Hangs up without a word."""
        self._first_to_leave()
        for line in self._lines.values():
            line.close()

    def _listen(self, peer: int, on_end: Callable[[int, bool], None]) -> None:
        ended, failed = peer, False
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            message = self._lines[peer].receive()
            if "done" in message:
                return
            ended, failed = int(message["ended"]), bool(message["failed"])
        if failed and self._failing:
            return  # both did, and each says why
        if self._first_to_leave():
            self._tell({"ended": ended, "failed": failed}, but=peer)
            on_end(ended, failed)

    def _first_to_leave(self) -> bool:
        """Whether nothing made this process leave before; what comes later follows from that."""
        with self._lock:
            first, self._leaving = not self._leaving, True
        return first

    def _tell(self, message: dict[str, object], but: int | None = None) -> None:
        for peer, line in self._lines.items():
            if peer != but:
                with contextlib.suppress(OSError):
                    line.send(message)


def meet(settings: ProcessSettings, config: DistributedConfig) -> tuple[Peers, str]:
    """Waits until all processes are there.

    Args:
      settings: who this process is.
      config: `timeout_seconds` to wait; `heartbeat_seconds` until a silent host is gone.

    Returns:
      The peers, and ``host:port`` for JAX's service, which process 0 chose.

    Raises:
      UserError: not all came in time, process 0 cannot listen, or the processes do not agree on
        who they are.
    """
    join = _await_all if settings.index == 0 else _join
    lines, address = join(settings, config.timeout_seconds)
    for line in lines.values():
        line.keep_alive(config.heartbeat_seconds)
    return Peers(settings.index, lines), address


def _await_all(settings: ProcessSettings, seconds: float) -> tuple[dict[int, MessageLine], str]:
    """Process 0: awaits each of the others, then tells them where JAX's service will be."""
    lines: dict[int, MessageLine] = {}
    try:
        _admit_all(settings, seconds, lines)
    except UserError as error:
        for line in lines.values():
            with contextlib.suppress(OSError):
                line.send({"error": str(error)})
            line.close()
        raise
    address = settings.at(free_port(settings.bind_host))
    for line in lines.values():
        with contextlib.suppress(OSError):  # one that is gone again: the watch says so
            line.send({"address": address})
    return lines, address


def _admit_all(settings: ProcessSettings, seconds: float, lines: dict[int, MessageLine]) -> None:
    deadline = time.monotonic() + seconds
    try:
        server = listen(settings.bind_host, settings.port)
    except OSError as error:
        raise UserError(
            f"{settings} cannot listen at {settings.address}: {error.strerror or error}. "
            f"LOWPREC_COORDINATOR must be an address of the host of process 0, with a free port."
        ) from error
    with server:
        while len(lines) < settings.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise UserError(_missing(settings, lines, seconds)) from None
            _admit(settings, MessageLine(connection), lines)


def _admit(settings: ProcessSettings, line: MessageLine, lines: dict[int, MessageLine]) -> None:
    """Adds a process that says who it is; hangs up on anything else that connects."""
    try:
        hello = line.receive(_GREETING_SECONDS)
        index, count = int(hello["process"]), int(hello["count"])
    except (OSError, ValueError, KeyError, TypeError):
        line.close()
        return
    problem = ""
    if count != settings.count:
        problem = f"process {index} was told of {count} processes, process 0 of {settings.count}"
    elif not 0 < index < count or index in lines:
        problem = f"two processes say that they are process {index} of {count}"
    if problem:
        problem += ". Give all the same LOWPREC_NUM_PROCESSES, each its own LOWPREC_PROCESS_ID."
        with contextlib.suppress(OSError):
            line.send({"error": problem})
        line.close()
        raise UserError(f"{settings}: {problem}")
    lines[index] = line


def _missing(settings: ProcessSettings, lines: dict[int, MessageLine], seconds: float) -> str:
    names = [str(i) for i in range(1, settings.count) if i not in lines]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"{settings} waited {seconds:g} s for the others at {settings.address}, but process "
        f"{shown} did not come. See its output for errors, start it with "
        f"LOWPREC_COORDINATOR={settings.address} LOWPREC_NUM_PROCESSES={settings.count} and its "
        f"own LOWPREC_PROCESS_ID, and check that its host reaches that address. "
        f"distributed.timeout_seconds sets how long to wait."
    )


def _join(settings: ProcessSettings, seconds: float) -> tuple[dict[int, MessageLine], str]:
    """Any other process: connects to process 0 as soon as that listens."""
    deadline = time.monotonic() + seconds
    problem: object = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            answer, line = _greet(settings, left, seconds + _GREETING_SECONDS)
        except (OSError, ValueError) as error:  # it does not listen yet, or has no address yet
            problem = getattr(error, "strerror", None) or error
            time.sleep(min(_RETRY_SECONDS, left))
            continue
        if "address" in answer:
            return {0: line}, str(answer["address"])
        line.close()
        raise UserError(f"{settings} was turned away: {answer.get('error')}")
    raise UserError(
        f"{settings} waited {seconds:g} s for process 0 at {settings.address}: {problem}. Start "
        f"process 0 with the same LOWPREC_COORDINATOR, see its output for errors, and check that "
        f"this host reaches that address. distributed.timeout_seconds sets how long to wait."
    )


def _greet(
    settings: ProcessSettings, connect_seconds: float, answer_seconds: float
) -> tuple[dict[str, object], MessageLine]:
    """Says who we are; process 0 answers when all are there, or when it gives up."""
    connection = socket.create_connection((settings.host, settings.port), timeout=connect_seconds)
    line = MessageLine(connection)
    try:
        line.send({"process": settings.index, "count": settings.count})
        return line.receive(answer_seconds), line
    except (OSError, ValueError):
        line.close()
        raise
