"""Eight emulated CPU devices, strict dtype promotion: set before JAX starts its backend."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA:CPU sizes its thread pool by cores: too few threads for the collectives of emulated devices.
os.environ.setdefault("PJRT_NPROC", "32")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=30",
    "--xla_cpu_collective_call_terminate_timeout_seconds=60",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "allow")


def pytest_addoption(parser):
    parser.addoption(
        "--full-matrix",
        action="store_true",
        help="run full products (recipes x transforms, devices x layouts), not only every pair",
    )
