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
from lowprec_jax.numerics import Format, decode, format_of, narrow_to_bf16

DotGeneral = Callable[..., jax.Array]
Formats = tuple[Format, Format]
# Of each operand, f32; None where only codes exist. See `ScaledArray.values`.
Values = tuple[jax.Array | None, jax.Array | None]


def native(
    lhs, rhs, dimension_numbers, *, formats: Formats, precision=None, out_sharding=None
) -> jax.Array:
    """Multiplies the codes as they are: f8 or f4 with f32 accumulation, integers with int32.

    Formats that no hardware multiplies with each other are upcast.
    """
    if not multiplies_natively(formats):
        return upcast(lhs, rhs, dimension_numbers, formats=formats, out_sharding=out_sharding)
    lhs, rhs = (as_native(x, fmt) for x, fmt in zip((lhs, rhs), formats, strict=True))
    integer = jnp.issubdtype(lhs.dtype, jnp.integer)
    product = lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=None if integer else precision,
        preferred_element_type=jnp.int32 if integer else jnp.float32,
        out_sharding=out_sharding,
    )
    return product.astype(jnp.float32)


def upcast(
    lhs,
    rhs,
    dimension_numbers,
    *,
    formats: Formats,
    precision=None,
    out_sharding=None,
    values: Values = (None, None),
) -> jax.Array:
    """Multiplies in bf16 where it holds the codes exactly (all of up to 8 bits), else in f32.

    Products accumulate in f32. The barrier keeps XLA from folding transposes into the matmul:
    XLA:CPU has no fast bf16 form with a transposed left operand, and fails at run time where a late
    fold makes one (0.10.2).
    """
    del precision  # of the products of the codes, which are exact in bf16
    exact = all(fmt.exact_in_bf16 for fmt in formats)
    dtype = jnp.bfloat16 if exact else jnp.float32
    lhs, rhs = lax.optimization_barrier(
        tuple(
            upcast_operand(x, fmt, dtype, known)
            for x, fmt, known in zip((lhs, rhs), formats, values, strict=True)
        )
    )
    return lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        precision=None if exact else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )


def upcast_operand(
    codes: jax.Array, fmt: Format, dtype, values: jax.Array | None = None
) -> jax.Array:
    """The codes in a wider type, in a form that `count_gemms` knows.

    That is a conversion of codes, which it sees, or a function that it knows by name.
    """
    if values is None and codes.dtype == fmt.native_dtype and dtype == jnp.bfloat16:
        return decode(codes, fmt, dtype)
    return _upcast_operand(codes, fmt, dtype, values)


@functools.partial(jax.jit, static_argnames=("fmt", "dtype"))
def _upcast_operand(codes: jax.Array, fmt: Format, dtype, values: jax.Array | None) -> jax.Array:
    if values is None:
        return decode(codes, fmt, dtype)
    return narrow_to_bf16(values) if dtype == jnp.bfloat16 else values.astype(dtype)


def multiplies_natively(formats: Formats) -> bool:
    """Whether there is hardware that multiplies codes of these formats with each other."""
    dtypes = [fmt.native_dtype for fmt in formats if fmt.native_dtype is not None]
    if len(dtypes) < len(formats):
        return False
    integers = [jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes]
    return all(integers) or not any(integers)


def as_native(codes: jax.Array, fmt: Format) -> jax.Array:
    """Codes in the type that hardware multiplies; 4-bit codes are held in bytes elsewhere."""
    dtype = jnp.dtype(fmt.native_dtype)
    if codes.dtype == dtype:
        return codes
    if jnp.issubdtype(dtype, jnp.integer):
        return codes.astype(dtype)
    return lax.bitcast_convert_type(codes.astype(jnp.uint4), dtype)


# "block_scaled" is native, and XLA's block-scaled matmul where scales lie in blocks along the
# contraction (`lowprec_jax.ops.block_product`): a matter of the chip, not of the platform.
BACKENDS: dict[str, DotGeneral] = {"native": native, "upcast": upcast, "block_scaled": native}


def register_backend(name: str, backend: DotGeneral) -> DotGeneral:
    """Adds a way to execute matmuls of codes.

    Args:
      name: what recipes, `dot` and ``--precision.backend`` call it.
      backend: a function with the signature of `native`.

    Returns:
      The same function.

    Raises:
      ValueError: another backend has this name.
    """
    if BACKENDS.get(name, backend) is not backend:
        raise ValueError(f"Backend {name!r} is registered already; choose another name.")
    BACKENDS[name] = backend
    return backend


def is_study(name: str | None) -> bool:
    """Whether a backend is one of its own, beside those that platforms choose among."""
    return name not in (None, "native", "upcast", "block_scaled")


def check_backend(name: str | None) -> None:
    """Refuses a backend that does not exist.

    Raises:
      ValueError: the message lists the known names and the nearest.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"Unknown backend {name!r}. Known: {', '.join(BACKENDS)}."
            + did_you_mean(name, BACKENDS)
        )


def dot(
    lhs,
    rhs,
    dimension_numbers,
    *,
    formats: Formats | None = None,
    precision=None,
    out_sharding=None,
    backend: str | None = None,
    values: Values = (None, None),
) -> jax.Array:
    """``lhs x rhs`` of low-precision codes, f32, without scales.

    Args:
      lhs: codes.
      rhs: codes.
      dimension_numbers: as in `jax.lax.dot_general`.
      formats: formats of the codes; None: those stored as the types of `lhs` and `rhs`.
      precision: "default" accumulation or `lax.Precision.HIGHEST` (split accumulation on GPU).
      out_sharding: as in `jax.lax.dot_general`.
      backend: a name in `BACKENDS`, or None for what the platform of the lowering executes best.
      values: what the codes stand for, where it is known; upcasting takes it.

    Raises:
      ValueError: an unknown backend.
    """
    check_backend(backend)
    options = {
        "dimension_numbers": dimension_numbers,
        "formats": formats or (format_of(lhs.dtype), format_of(rhs.dtype)),
        "precision": precision,
        "out_sharding": out_sharding,
    }
    if backend == "upcast":
        return upcast(lhs, rhs, values=values, **options)
    if backend is not None:
        return BACKENDS[backend](lhs, rhs, **options)
    return lax.platform_dependent(
        lhs,
        rhs,
        values,
        cpu=lambda lhs, rhs, values: upcast(lhs, rhs, values=values, **options),
        default=lambda lhs, rhs, values: native(lhs, rhs, **options),
    )
