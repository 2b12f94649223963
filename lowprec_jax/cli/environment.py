"""Environment variables that JAX reads when it starts; set before anything imports it.

Imports no JAX. Public name: `prepare_environment`.
"""

import importlib.util
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # nothing of the package may be imported before the variables are set
    from lowprec_jax.training.config import TrainConfig

__all__ = ["prepare_environment"]

# What the JAX wheels for GPUs and TPUs install. The ROCm ones carry a version in their name.
_ACCELERATOR_PLUGINS = (
    "jax_cuda13_plugin",
    "jax_cuda12_plugin",
    "jax_rocm7_plugin",
    "jax_rocm60_plugin",
    "libtpu",
)
_DEVICE_COUNT = "xla_force_host_platform_device_count"


def prepare_environment(
    config: "TrainConfig", environ: MutableMapping[str, str] | None = None
) -> None:
    """Sets what JAX must find when it starts: emulated devices, and threads for them.

    Emulated CPU devices are asked for when the mesh has more than one device and either
    JAX_PLATFORMS names the CPU first, or it is not set and no accelerator plugin is installed.
    XLA:CPU sizes its thread pool by cores, and the collectives of emulated devices deadlock at
    random with fewer than two threads a device. One device keeps the default: with 32 threads on
    two cores a training step took 1.25 times as long. What the user has set stays.

    Args:
      config: the run; only `config.mesh` is read.
      environ: environment to change; None: that of this process.
    """
    environ = os.environ if environ is None else environ
    devices = config.mesh.data
    if devices == 1 or not _runs_on_cpu(environ):
        return
    environ.setdefault("PJRT_NPROC", str(max(32, 4 * devices)))
    flags = environ.get("XLA_FLAGS", "")
    if _DEVICE_COUNT not in flags:
        environ["XLA_FLAGS"] = f"{flags} --{_DEVICE_COUNT}={devices}".strip()


def _runs_on_cpu(environ: MutableMapping[str, str]) -> bool:
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0].strip() == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS)
