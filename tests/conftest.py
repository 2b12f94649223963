"""Before JAX starts: emulated devices, strict promotion, one cache of compiled programs."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA:CPU sizes its thread pool by cores: too few threads for the collectives of emulated devices.
os.environ.setdefault("PJRT_NPROC", "32")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=30",
    "--xla_cpu_collective_call_terminate_timeout_seconds=60",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

# A program that several runs, workers or child processes use is compiled once a session. The cache
# starts empty, so nothing is compared with what an earlier session compiled. Workers inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lowprec_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "allow")


def pytest_addoption(parser):
    parser.addoption(
        "--full-matrix",
        action="store_true",
        help="run full products (recipes x transforms, devices x layouts), not only every pair",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full-matrix"):
        skip = pytest.mark.skip(reason="nightly: --full-matrix")
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(skip)
