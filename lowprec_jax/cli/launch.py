"""``lowprec_jax launch``: a run of several processes on this machine, without a cluster.

Imports no JAX. Public names: `launch`, `run_launch`.
"""

import argparse
import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from lowprec_jax.cli.environment import emulate_devices
from lowprec_jax.errors import UserError
from lowprec_jax.training.message_line import free_port
from lowprec_jax.training.process_settings import EXIT_PEER_LOST, PEER_LOST_PREFIX

__all__ = ["launch", "run_launch"]

_GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL; from the end of a survivor to that of its peer
_TOGETHER_SECONDS = 0.5  # several that fail alike
_POLL_SECONDS = 0.05
_TAIL_LINES = 20
# Gloo reports each connection, from several threads into one line; a survivor's line says less
# than what is said here.
_NOISE = ("[Gloo] Rank ", "Expected number of connected peer ranks", PEER_LOST_PREFIX)


def run_launch(words: Sequence[str]) -> int:
    """Runs ``lowprec_jax launch WORDS`` and returns the exit code.

    Raises:
      UserError: the words do not say what to run, or in how many processes.
    """
    parser = argparse.ArgumentParser(
        prog="lowprec_jax launch",
        usage="lowprec_jax launch --processes N [--devices N] -- SUBCOMMAND [options]",
        description="Runs a subcommand in several processes of this machine, connected as one run. "
        "The output of process 0 is shown; of another only the end of its errors, if it fails. "
        "--import MODULE, before or after '--', makes what a module registers known to them.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, help="processes to start")
    parser.add_argument(
        "--devices", type=int, help="CPU devices that each process emulates (default: as set)"
    )
    end = words.index("--") if "--" in words else len(words)
    rest = words[end + 1 :]
    try:
        options, unknown = parser.parse_known_args(words[:end])
    except argparse.ArgumentError as error:
        raise UserError(f"lowprec_jax launch: {error}.") from error
    if unknown or not rest or options.processes is None:
        what = "has no --processes" if options.processes is None else "has nothing to run"
        what = f"does not know {' '.join(unknown)}" if unknown else what
        raise UserError(
            f"lowprec_jax launch {what}. Write the subcommand after '--', such as: "
            f"lowprec_jax launch --processes 2 -- train --config smoke."
        )
    command = [sys.executable, "-m", "lowprec_jax", *rest]
    return launch(command, processes=options.processes, devices=options.devices)


def launch(command: Sequence[str], *, processes: int, devices: int | None = None) -> int:
    """Runs a command in several processes until all are done or one fails.

    Each finds LOWPREC_COORDINATOR, LOWPREC_NUM_PROCESSES and LOWPREC_PROCESS_ID in its
    environment. The first failure ends all: SIGTERM, then SIGKILL. So do Ctrl-C and SIGTERM.
    Output is taken by the line: a process that writes parts of lines to its pipe may find a line
    of Gloo between them, and loses what shares that line.

    Args:
      command: program and arguments.
      processes: how many, >= 1.
      devices: CPU devices that each emulates; None: the environment stays as it is.

    Returns:
      0, or the exit code of the process that failed first; 128 + the signal that ended it.

    Raises:
      UserError: a number is below 1.
    """
    for name, value in (("processes", processes), ("devices", devices)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; allowed: 1 or more.")
    address = f"127.0.0.1:{free_port()}"
    children: list[_Child] = []
    with _signals() as received, _ended_together(children):
        for index in range(processes):
            environ = _environment(address, processes, index, devices)
            children.append(_Child(command, environ, shown=index == 0))
        failed = _first_failure(children, received)
    if received:
        return 128 + received[0]
    if failed is None:
        return 0
    _report(failed, children)
    return _exit_code(children[failed])


class _Child:
    """A process in a session of its own, so that Ctrl-C reaches the launcher alone."""

    def __init__(self, command: Sequence[str], environ: dict[str, str], *, shown: bool):
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._pumps = [
            threading.Thread(target=self._pump, args=args, daemon=True)
            for args in (
                (self.process.stdout, sys.stdout if shown else None, False),
                (self.process.stderr, sys.stderr if shown else None, not shown),
            )
        ]
        for pump in self._pumps:
            pump.start()

    def end(self, number: int) -> None:
        """Sends a signal to the process and to what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def finish_output(self) -> None:
        """Waits for the last lines of output."""
        for pump in self._pumps:
            pump.join(_GRACE_SECONDS)

    def _pump(self, source: IO[bytes], target: IO[str] | None, keep: bool) -> None:
        with source:
            for line in source:
                text = line.decode(errors="replace")
                if any(noise in text for noise in _NOISE):
                    continue
                if keep:
                    self.tail.append(text.rstrip())
                if target is not None:
                    target.write(text)
                    target.flush()


def _environment(address: str, processes: int, index: int, devices: int | None) -> dict[str, str]:
    environ = dict(os.environ)
    if devices is not None:
        environ["JAX_PLATFORMS"] = "cpu"
        emulate_devices(devices, environ)
    environ["LOWPREC_COORDINATOR"] = address
    environ["LOWPREC_NUM_PROCESSES"] = str(processes)
    environ["LOWPREC_PROCESS_ID"] = str(index)
    return environ


def _first_failure(children: list[_Child], received: list[int]) -> int | None:
    """Waits until all are done or a signal is received (None), or one fails; returns which.

    Of several that fail alike it is the lowest, whose output was shown. A process that ended
    because it lost a peer is the last to be blamed: the peer gets a moment to end.
    """
    since = None
    while not received:
        codes = [child.process.poll() for child in children]
        failed = [i for i, code in enumerate(codes) if code]
        causes = [i for i in failed if codes[i] != EXIT_PEER_LOST]
        if failed:
            since = since or time.monotonic()
            wait = _TOGETHER_SECONDS if causes else _GRACE_SECONDS
            if None not in codes or time.monotonic() > since + wait:
                return min(causes or failed)
        elif None not in codes:
            break
        time.sleep(_POLL_SECONDS)
    return None


@contextlib.contextmanager
def _ended_together(children: list[_Child]) -> Iterator[None]:
    """Leaves no process behind, however the body ends."""
    try:
        yield
    finally:
        for child in children:
            child.end(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(deadline - time.monotonic(), 0))
        for child in children:
            child.end(signal.SIGKILL)  # also what outlived its parent
            child.process.wait()
            child.finish_output()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that neither interrupts the ending of the children."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def note(number: int, _frame: object) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(index: int, children: list[_Child]) -> None:
    """Says which process failed, and shows the end of its errors if they were not shown."""
    child = children[index]
    code = child.process.returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    for line in child.tail:
        print(f"[{index}] {line}", file=sys.stderr)
    others = "; the others were ended" if len(children) > 1 else ""
    print(
        f"lowprec_jax launch: process {index} of {len(children)} ended {how}{others}.",
        file=sys.stderr,
    )


def _exit_code(child: _Child) -> int:
    code = child.process.returncode
    return 128 - code if code < 0 else code
