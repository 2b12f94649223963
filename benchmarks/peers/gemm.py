"""What no library can beat: the rate of large square matmuls on this device.

Public names: `measured_peaks`, `peak_dtypes`, `gemm_rate`.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SIZE = 8192  # 8192 cubed fills every NVIDIA data centre GPU


def peak_dtypes(platform: str) -> dict[str, Any]:
    """The operand types whose peaks are measured on a platform: none where f8 is emulated."""
    return {"bf16": jnp.bfloat16, "f8": jnp.float8_e4m3fn} if platform == "gpu" else {}


def measured_peaks(platform: str, size: int = SIZE) -> dict[str, float]:
    """TFLOP/s by name of the operand type; empty on platforms without a peak to compare with.

    Args:
      platform: as `jax.default_backend` says it.
      size: rows and columns of the matrices.
    """
    return {name: gemm_rate(dtype, size) for name, dtype in peak_dtypes(platform).items()}


def gemm_rate(dtype: Any, size: int, rounds: int = 20) -> float:
    """TFLOP/s of a square matmul with bf16 results, from the median of the rounds.

    Args:
      dtype: type of both operands; the right one is transposed, as f8 GEMMs want it.
      size: rows and columns.
      rounds: calls that are timed, after one that is not.
    """
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16).astype(dtype) for key in keys)
    numbers = (((1,), (1,)), ((), ()))
    multiply = jax.jit(
        lambda a, b: lax.dot_general(a, b, numbers, preferred_element_type=jnp.bfloat16)
    )
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(multiply(a, b))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e12
