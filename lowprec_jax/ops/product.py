"""The product of two operands of a GEMM, quantized or not, with their scales."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.numerics import ScaledArray, decode, narrow_to_bf16, spread
from lowprec_jax.ops import backends
from lowprec_jax.ops.block_product import multiply_blocks
from lowprec_jax.ops.dimensions import DotDimensions
from lowprec_jax.ops.operands import Operand
from lowprec_jax.recipes import Gemm


def product(
    left: Operand,
    right: Operand,
    gemm: Gemm | None,
    dimensions: DotDimensions,
    *,
    precision=None,
    backward: bool = False,
    out_sharding=None,
    backend: str | None = None,
) -> jax.Array:
    """``left x right``, f32.

    Scales that are constant along the contraction multiply the product of the codes. Where they are
    not (blocks), `lowprec_jax.ops.block_product` says what accelerators multiply, and elsewhere the
    operands are dequantized: to bf16 where that is exact (powers of two; NVFP4 without the scale of
    the tensor), else to f32.
    An operand whose partner is in high precision is dequantized to the type of the partner.

    Args:
      left: an operand.
      right: an operand.
      gemm: how they were quantized.
      dimensions: as in `jax.lax.dot_general`.
      precision: for matmuls in high precision.
      backward: accumulate accurately (split accumulation on GPU).
      out_sharding: sharding of the result on a mesh with explicit axes.
      backend: see `lowprec_jax.ops.backends.dot`.
    """
    plain = functools.partial(
        lax.dot_general,
        dimension_numbers=dimensions,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    if not (isinstance(left, ScaledArray) and isinstance(right, ScaledArray)):
        left, right = _high_precision(left, right), _high_precision(right, left)
        return plain(left, right, precision=precision)
    (contracted_left, contracted_right), _ = dimensions
    if _factors_out(left, contracted_left) and _factors_out(right, contracted_right):
        codes = backends.dot(
            left.data,
            right.data,
            dimensions,
            formats=(left.format, right.format),
            precision=lax.Precision.HIGHEST if backward else lax.Precision.DEFAULT,
            out_sharding=out_sharding,
            backend=backend,
            values=(left.values, right.values),
        )
        scale = _output_scale(left, right, dimensions)
        return lax.mul(codes, scale) if scale.ndim == 0 else codes * scale
    assert gemm is not None
    return _multiply_tiles(left, right, gemm, dimensions, plain, backend)


def _multiply_tiles(
    left: ScaledArray, right: ScaledArray, gemm: Gemm, dimensions: DotDimensions, plain, backend
) -> jax.Array:
    """Operands whose scales vary along the contraction."""
    assert gemm.left is not None
    assert gemm.right is not None
    backends.check_backend(backend)
    exact = gemm.left.exact_in_bf16 and gemm.right.exact_in_bf16

    def dequantized(left: ScaledArray, right: ScaledArray) -> jax.Array:
        dtype = jnp.bfloat16 if exact else jnp.float32
        operands = lax.optimization_barrier(
            (dequantized_operand(left, dtype), dequantized_operand(right, dtype))
        )
        return plain(*operands, precision=None if exact else lax.Precision.HIGHEST)

    def in_blocks(left: ScaledArray, right: ScaledArray) -> jax.Array:
        if plain.keywords["out_sharding"] is not None:  # the reshapes are not for split axes
            return dequantized(left, right)
        result = multiply_blocks(left, right, gemm, dimensions, backend)
        return dequantized(left, right) if result is None else result

    if backend is None:
        result = lax.platform_dependent(left, right, cpu=dequantized, default=in_blocks)
    else:
        result = (dequantized if backend == "upcast" else in_blocks)(left, right)
    for operand in (left, right):
        scale = operand.scale if operand.per_tensor else operand.global_scale
        result = result if scale is None else result * scale
    return result


def _high_precision(x: Operand, partner: Operand) -> jax.Array:
    if not isinstance(x, ScaledArray):
        return x
    return x.dequantize(jnp.float32 if isinstance(partner, ScaledArray) else partner.dtype)


def _factors_out(x: ScaledArray, contracted: tuple[int, ...]) -> bool:
    """Whether the scale is constant along the contraction and has an entry for each other index."""
    if x.per_tensor:
        return True
    return x.global_scale is None and all(
        size == 1 or (axis not in contracted and size == n)
        for axis, (size, n) in enumerate(zip(x.scale.shape, x.shape, strict=True))
    )


def _output_scale(left: ScaledArray, right: ScaledArray, dimensions: DotDimensions) -> jax.Array:
    """The product of the scales in the layout of the result: batch, free left, free right axes."""
    if left.per_tensor and right.per_tensor:
        return lax.mul(left.scale, right.scale)
    (contracted_left, contracted_right), (batch_left, batch_right) = dimensions
    free_left = left.data.ndim - len(contracted_left) - len(batch_left)
    free_right = right.data.ndim - len(contracted_right) - len(batch_right)
    return _laid_out(left, contracted_left, batch_left, after=free_right) * _laid_out(
        right, contracted_right, batch_right, before=free_left
    )


def _laid_out(x: ScaledArray, contracted, batch, *, before: int = 0, after: int = 0) -> jax.Array:
    if x.per_tensor:
        return x.scale
    free = [i for i in range(x.scale.ndim) if i not in (*contracted, *batch)]
    scale = x.scale.transpose((*batch, *free, *contracted))
    shape = scale.shape[: len(batch) + len(free)]
    batches, frees = shape[: len(batch)], shape[len(batch) :]
    return scale.reshape((*batches, *(1,) * before, *frees, *(1,) * after))


@functools.partial(jax.jit, static_argnames="dtype")
def dequantized_operand(x: ScaledArray, dtype) -> jax.Array:
    """The operand without the scale of the tensor; a function that `count_gemms` knows by name."""
    if x.per_tensor:
        return backends.upcast_operand(x.data, x.format, dtype, x.values)
    values = decode(x.data, x.format) if x.values is None else x.values
    values = values * spread(x.scale, x.shape, x.tile)
    return narrow_to_bf16(values) if dtype == jnp.bfloat16 else values
