"""Which processes train together: options, environment variables, and what they come to.

Imports no JAX: the answer is needed before it starts. Public names: `DistributedConfig`,
`ProcessSettings`, `process_settings`, `detected_cluster`, `EXIT_PEER_LOST`, `PEER_LOST_PREFIX`.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Literal

from lowprec_jax.errors import UserError
from lowprec_jax.training.config_checks import require, require_at_least, require_between

__all__ = [
    "EXIT_PEER_LOST",
    "PEER_LOST_PREFIX",
    "DistributedConfig",
    "ProcessSettings",
    "detected_cluster",
    "process_settings",
]

EXIT_PEER_LOST = 3
"""Exit code of a process that ends because another is missing or ended too early."""

PEER_LOST_PREFIX = "lowprec_jax: peer lost: "
"""Begins the line that such a process writes to stderr."""

# Each option of `DistributedConfig` that says who this process is, and its variable.
_VARIABLES = {
    "coordinator": "LOWPREC_COORDINATOR",
    "num_processes": "LOWPREC_NUM_PROCESSES",
    "process_id": "LOWPREC_PROCESS_ID",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How several processes, such as one for each host, train together."""

    mode: Literal["auto", "on", "off"] = "auto"
    """auto: if LOWPREC_* or a cluster's variables are set; on: or it is an error; off: never."""
    coordinator: str | None = None
    """host:port where process 0 awaits the others; LOWPREC_COORDINATOR goes first."""
    num_processes: int | None = None
    """Processes in all; LOWPREC_NUM_PROCESSES goes first."""
    process_id: int | None = None
    """Which one this is, from 0; LOWPREC_PROCESS_ID goes first."""
    timeout_seconds: int = 300
    """How long a process waits for the others at the start."""
    heartbeat_seconds: int = 20
    """How long a process may be silent before the others take it for dead."""

    def __post_init__(self) -> None:
        require_at_least("timeout_seconds", self.timeout_seconds, 1)
        require_between("heartbeat_seconds", self.heartbeat_seconds, 5, 3600)
        if self.num_processes is not None:
            require_at_least("num_processes", self.num_processes, 1)
        if self.process_id is not None:
            require_at_least("process_id", self.process_id, 0)
        if self.coordinator is not None:
            require(
                _is_address(self.coordinator),
                f"coordinator is {self.coordinator!r}; allowed: host:port, such as 10.0.0.1:9876.",
            )


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
    """Who this process is, when we are told rather than JAX's cluster detection.

    Attributes:
      host: name or address of process 0.
      port: where process 0 awaits the others.
      count: processes in all, >= 1.
      index: which one this is, 0 .. count - 1.
    """

    host: str
    port: int
    count: int
    index: int

    @property
    def address(self) -> str:
        """``host:port`` where process 0 awaits the others."""
        return self.at(self.port)

    @property
    def bind_host(self) -> str:
        """Where process 0 listens: "" (all interfaces), unless the run stays on one host."""
        return self.host if self.host == "localhost" or self.host.startswith("127.") else ""

    def at(self, port: int) -> str:
        """``host:port`` of another port of process 0."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def process_settings(
    config: DistributedConfig, environ: Mapping[str, str] | None = None
) -> ProcessSettings | None:
    """Returns who this process is by our options and variables; None: they do not say.

    A variable goes before its option, so that processes may share one config file.

    Args:
      config: the options. Mode "off" gives None.
      environ: None: the environment of this process.

    Raises:
      UserError: a variable is malformed, only some of the three are known, the index is not below
        the count, or the variables are set though mode is "off".
    """
    environ = os.environ if environ is None else environ
    given = [variable for variable in _VARIABLES.values() if environ.get(variable)]
    if config.mode == "off":
        if given:
            raise UserError(
                f"distributed.mode is off, but {_and(given)} {_is(given)} set: each process would "
                f"train alone. Unset {_them(given)}, or use distributed.mode auto."
            )
        return None
    values = {name: _value(config, name, environ) for name in _VARIABLES}
    missing = [f"{_VARIABLES[name]} (or distributed.{name})" for name in values if not values[name]]
    if len(missing) == len(values):
        return None
    if missing:
        known = [f"{_VARIABLES[name]} {value}" for name, value in values.items() if value]
        raise UserError(
            f"Several processes need three settings; given: {_and(known)}. Missing: "
            f"{_and(missing)}. Set all three, or none to train in one process."
        )
    host, _, port = values["coordinator"].rpartition(":")
    settings = ProcessSettings(
        host.strip("[]"), int(port), int(values["num_processes"]), int(values["process_id"])
    )
    if not 0 <= settings.index < settings.count:
        raise UserError(
            f"LOWPREC_PROCESS_ID {settings.index} is not below LOWPREC_NUM_PROCESSES "
            f"{settings.count}; allowed: 0 to {settings.count - 1}, each given to one process."
        )
    return settings


def detected_cluster(environ: Mapping[str, str] | None = None) -> str | None:
    """Returns the cluster whose variables are set for several processes, or None.

    JAX has no public way to ask what `jax.distributed.initialize` would detect. These are the
    variables it documents and reads; a job of one process is none. The pods of a TPU on Compute
    Engine are known to its metadata server alone: there, use mode "on".

    Args:
      environ: None: the environment of this process.
    """
    environ = os.environ if environ is None else environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm) and _number(environ, "SLURM_NTASKS") > 1:
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environ and _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys() and _installed(
        "kubernetes"
    ):
        return "Kubernetes"
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    several = "," in hosts or _number(environ, "MEGASCALE_NUM_SLICES") > 1
    return "TPU pod" if several and _installed("libtpu") else None


def _value(config: DistributedConfig, name: str, environ: Mapping[str, str]) -> str:
    """What a variable, or else its option, says; "" if neither does."""
    variable = _VARIABLES[name]
    text = environ.get(variable, "")
    if not text:
        option = getattr(config, name)
        return "" if option is None else str(option)
    if name == "coordinator":
        allowed, valid = "host:port, such as 10.0.0.1:9876", _is_address(text)
    else:
        low = 1 if name == "num_processes" else 0
        allowed, valid = f"{low} or more", _is_number(text) and int(text) >= low
    if not valid:
        raise UserError(f"{variable} is {text!r}; allowed: {allowed}.")
    return text


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return host != "" and _is_number(port) and 0 < int(port) < 2**16


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if _is_number(text) else 0


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _them(names: list[str]) -> str:
    return "them" if len(names) > 1 else "it"
