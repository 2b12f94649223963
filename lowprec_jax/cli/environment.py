"""Environment variables that JAX reads when it starts; set before anything imports it.

Imports no JAX. Public names: `prepare_environment`, `emulate_devices`.
"""

import importlib.util
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from lowprec_jax.errors import UserError

if TYPE_CHECKING:  # nothing that may start JAX is imported before the variables are set
    from lowprec_jax.training.config import TrainConfig

__all__ = ["emulate_devices", "prepare_environment"]

# What the JAX wheels for GPUs and TPUs install. The ROCm ones carry a version in their name.
_ACCELERATOR_PLUGINS = (
    "jax_cuda13_plugin",
    "jax_cuda12_plugin",
    "jax_rocm7_plugin",
    "jax_rocm60_plugin",
    "libtpu",
)
_MOST_EMULATED = 512  # 256 start in 2 s, 1024 in 6 s, 4096 in 30 s on two cores
_DEVICE_COUNT = "xla_force_host_platform_device_count"


def prepare_environment(
    config: "TrainConfig", environ: MutableMapping[str, str] | None = None
) -> None:
    """Sets what JAX must find when it starts: emulated devices, and threads for them.

    Emulated CPU devices are asked for when the mesh has more than one device and either
    JAX_PLATFORMS names the CPU first, or it is not set and no accelerator plugin is installed.
    XLA:CPU sizes its thread pool by cores, and the collectives of emulated devices deadlock at
    random with fewer than two threads a device. One device keeps the default: with 32 threads on
    two cores a training step took 1.25 times as long. What the user has set stays. Each of
    several processes (LOWPREC_NUM_PROCESSES) emulates its part of the mesh.

    Args:
      config: the run; only `config.mesh` is read.
      environ: environment to change; None: that of this process.

    Raises:
      UserError: more devices than a CPU should emulate.
    """
    environ = os.environ if environ is None else environ
    processes = environ.get("LOWPREC_NUM_PROCESSES", "")  # what is wrong with it is said later
    devices = -(-config.mesh.size // max(int(processes) if processes.isdecimal() else 1, 1))
    if devices == 1 or not _runs_on_cpu(environ):
        return
    if _DEVICE_COUNT in environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in environ:
        environ.setdefault("PJRT_NPROC", _threads(devices))
    elif devices > _MOST_EMULATED:
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor is {config.mesh.size} devices, {devices} of them "
            f"here, which the CPU has to emulate; allowed: {_MOST_EMULATED} or less."
        )
    else:
        emulate_devices(devices, environ)


def emulate_devices(devices: int, environ: MutableMapping[str, str]) -> None:
    """Asks for this many emulated CPU devices, in place of any number asked for before."""
    environ.pop("JAX_NUM_CPU_DEVICES", None)  # JAX refuses both
    flags = environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if not flag.startswith(f"--{_DEVICE_COUNT}")]
    environ["XLA_FLAGS"] = " ".join([*kept, f"--{_DEVICE_COUNT}={devices}"])
    environ.setdefault("PJRT_NPROC", _threads(devices))


def _threads(devices: int) -> str:
    return str(max(32, 4 * devices))


def _runs_on_cpu(environ: MutableMapping[str, str]) -> bool:
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0].strip() == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS)
