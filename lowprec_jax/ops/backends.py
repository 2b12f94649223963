"""How a low-precision matmul is executed: natively, or upcast exactly.

The choice is made when the program is lowered, for the platform it is lowered for, never by
`jax.default_backend()`: the same traced function runs on CPU and cross-lowers to CUDA or TPU.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.errors import did_you_mean

DotGeneral = Callable[..., jax.Array]


def native(lhs, rhs, dimension_numbers, *, precision, out_sharding=None) -> jax.Array:
    """Multiplies the codes as they are: f8 operands, f32 accumulation."""
    return lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )


def upcast(lhs, rhs, dimension_numbers, *, precision, out_sharding=None) -> jax.Array:
    """Multiplies in bf16, which holds every 8-bit float exactly; products accumulate in f32.

    The barrier keeps XLA from folding transposes into the matmul: XLA:CPU has no fast bf16 form
    with a transposed left operand, and fails at run time where a late fold makes one (0.10.2).
    """
    del precision  # the products of 8-bit floats are exact
    lhs, rhs = lax.optimization_barrier((lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)))
    return lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )


BACKENDS: dict[str, DotGeneral] = {"native": native, "upcast": upcast}

# The form each platform executes; platforms not named take the native one.
_BY_PLATFORM = {"cpu": upcast}


def dot(lhs, rhs, dimension_numbers, *, precision=None, out_sharding=None, backend=None):
    """``lhs x rhs`` of low-precision codes, f32, without scales.

    Args:
      lhs: codes of an 8-bit float type.
      rhs: codes of an 8-bit float type.
      dimension_numbers: as in `jax.lax.dot_general`.
      precision: "default" accumulation or `lax.Precision.HIGHEST` (split accumulation on GPU).
      out_sharding: as in `jax.lax.dot_general`.
      backend: "native", "upcast", or None for what the platform of the lowering executes best.

    Raises:
      ValueError: an unknown backend.
    """
    options = {
        "dimension_numbers": dimension_numbers,
        "precision": precision,
        "out_sharding": out_sharding,
    }
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(
                f"Unknown backend {backend!r}. Known: {', '.join(BACKENDS)}."
                + did_you_mean(backend, BACKENDS)
            )
        return BACKENDS[backend](lhs, rhs, **options)
    branches = {name: functools.partial(f, **options) for name, f in _BY_PLATFORM.items()}
    return lax.platform_dependent(
        lhs, rhs, default=functools.partial(native, **options), **branches
    )
