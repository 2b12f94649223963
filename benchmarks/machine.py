"""Where a number was measured: processor, versions, date and allocator. Imports no JAX.

Public names: `describe_machine`, `describe_allocator`, `use_allocator`, `write_json`.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# glibc gives large blocks back to the system at every step and pays for fresh pages at the next.
# These keep blocks of up to 1 GiB; they gain up to 40 % of a small training step, for every
# precision.
RAISED_THRESHOLDS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
ALLOCATORS = ("raised", "default")


def use_allocator(setting: str, module: str, argv: Sequence[str]) -> int | None:
    """Runs a benchmark again in a subprocess with glibc's thresholds raised.

    glibc reads them when a process starts, so that a running one cannot change its own.

    Args:
      setting: "raised", or "default" for what the environment says.
      module: the benchmark, ``benchmarks.NAME``.
      argv: its words.

    Returns:
      The exit code of the subprocess; None where this process has the setting already.
    """
    if setting == "default" or all(os.environ.get(k) == v for k, v in RAISED_THRESHOLDS.items()):
        return None
    command = [sys.executable, "-m", module, *argv]
    return subprocess.run(command, env={**os.environ, **RAISED_THRESHOLDS}).returncode


def describe_allocator() -> str:
    """The settings of glibc's allocator in this process, in words."""
    given = [f"{name}={os.environ[name]}" for name in RAISED_THRESHOLDS if name in os.environ]
    return ", ".join(given) or "glibc's defaults"


def describe_machine() -> dict[str, Any]:
    """Machine, date in UTC, versions and allocator, as plain JSON."""
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("lowprec-jax", "jax", "jaxlib", "flax", "optax")
        },
        "allocator": describe_allocator(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _processor() -> str:
    """Model name of the first processor, with the 16-bit float units that a CPU result hangs on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in text.split("\n\n")[0].splitlines()
        if ":" in line
    )
    units = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in fields.get("flags", "")]
    return " ".join([fields.get("model name", platform.processor()), *units])
