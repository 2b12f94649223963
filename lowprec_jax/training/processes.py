"""Starts `jax.distributed` for the processes of a run, and ends them together.

Public names: `Processes`, `start_processes`.

JAX's own service answers a missing or dead peer with an abort from C++. Processes that are told
who they are (`LOWPREC_*` or options) meet first and watch each other (`training/peers.py`), so
that a person reads which process is missing. In a cluster that JAX detects itself only the start
is watched, by a timer; later on JAX's heartbeats and the cluster's own launcher end the run.
"""

import contextlib
import os
import threading
from types import TracebackType
from typing import Self

import jax

from lowprec_jax.errors import UserError
from lowprec_jax.training.peers import Peers, meet
from lowprec_jax.training.process_settings import (
    EXIT_PEER_LOST,
    PEER_LOST_PREFIX,
    DistributedConfig,
    detected_cluster,
    process_settings,
)

__all__ = ["Processes", "start_processes"]

# JAX would abort at its own limit, without naming anybody: ours comes first.
_SLACK_SECONDS = 30


class Processes:
    """The processes of a run, seen from one of them; a context manager for the run's body.

    At its end the processes wait for each other. An error that leaves the body ends the others
    too, so what may fail in one process alone belongs inside.

    Attributes:
      index: this process, 0 .. count - 1.
      count: processes in all.
    """

    def __init__(self, index: int = 0, count: int = 1, peers: Peers | None = None):
        self.index, self.count, self._peers = index, count, peers

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes the logs."""
        return self.index == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._peers is None:
            return
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._peers.finish()
        else:
            self._peers.fail()


def start_processes(config: DistributedConfig) -> Processes:
    """Connects this process to the others of its run. Call it before JAX starts its backend.

    In a run of several processes SIGTERM ends a process, as it does otherwise: JAX's preemption
    service, which would swallow the signal, is switched off.

    Args:
      config: the options; environment variables go before them.

    Returns:
      This process and how many there are; one process for a run that is not distributed.

    Raises:
      UserError: settings are missing or contradict each other, or not all processes came in time.
      RuntimeError: JAX's backend has started.
    """
    settings = process_settings(config)
    if settings is not None:
        if settings.count == 1:
            return Processes()
        peers, address = meet(settings, config)
        peers.watch(lambda process, failed: _end_after(process, failed, settings.index))
        port = address.rpartition(":")[2]
        _initialize(
            config,
            str(settings),
            coordinator_address=address,
            coordinator_bind_address=f"{settings.bind_host or '[::]'}:{port}",
            num_processes=settings.count,
            process_id=settings.index,
            cluster_detection_method="deactivate",
        )
        return Processes(settings.index, settings.count, peers)
    cluster = detected_cluster() if config.mode == "auto" else "a cluster"
    if config.mode == "off" or cluster is None:
        return Processes()
    _initialize(config, f"this process of {cluster}")
    return Processes(jax.process_index(), jax.process_count())


def _initialize(config: DistributedConfig, who: str, **arguments: str | int) -> None:
    """Runs `jax.distributed.initialize`, with words of our own if it fails or takes too long."""
    jax.config.update("jax_enable_preemption_service", False)
    seconds = config.timeout_seconds
    too_late = threading.Timer(seconds, _end_too_late, (who, seconds))
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=seconds + _SLACK_SECONDS,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=seconds,
            **arguments,  # pyright: ignore[reportArgumentType]
        )
    except ValueError as error:
        raise UserError(
            f"distributed.mode is {config.mode}, but JAX cannot tell which process this is: "
            f"{error} Set LOWPREC_COORDINATOR, LOWPREC_NUM_PROCESSES and LOWPREC_PROCESS_ID, or "
            f"use distributed.mode off to train in one process."
        ) from error
    finally:
        too_late.cancel()


def _end_too_late(who: str, seconds: float) -> None:
    """Ends this process when JAX's own start hangs."""
    _say(
        f"{who} waited {seconds:g} s for the others in jax.distributed.initialize. See their "
        f"output for errors. distributed.timeout_seconds sets how long to wait."
    )
    os._exit(EXIT_PEER_LOST)


def _end_after(process: int, failed: bool, index: int) -> None:
    """Ends this process after another one has ended too early."""
    how = "failed" if failed else "ended too early: it was killed, or its host is gone"
    _say(
        f"process {process} {how}. Process {index} ends too, as it cannot go on alone. See the "
        f"output of process {process} for the reason, then start all of them again; "
        f"--resume continues from the newest checkpoint."
    )
    if failed:  # it waits for the others to leave JAX's service, and would be aborted otherwise
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(EXIT_PEER_LOST)


def _say(message: str) -> None:
    """Writes to stderr past Python's buffer, whose lock the main thread may hold."""
    os.write(2, f"{PEER_LOST_PREFIX}{message}\n".encode())
