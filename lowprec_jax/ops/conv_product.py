"""The product of a convolution: how it is executed, and along which axes its scales lie.

Where scales finer than the tensor lie; blocks are cut along the last axis in each cell, the axes
before it have a scale for each index:

===========  ======================================  ===========================================
operand      first product                           second product
===========  ======================================  ===========================================
lhs          fwd: along the features, for each       wgrad: along batch and positions, for each
             position of each batch entry            feature
rhs          fwd: along the window and the input     dgrad: along the output features, for each
             features, for each output feature       place in the window and input feature
output_grad  dgrad: along the features, for each     wgrad: along batch and positions, for each
             position of each batch entry            feature
===========  ======================================  ===========================================

A window adds up positions, so only the scale of a whole tensor can multiply the result. Operands
with finer scales are dequantized before, to bf16 where that is exact.

Codes are multiplied in bf16, or in f32 where bf16 does not hold them, on every platform and with
every backend: XLA has no f8 convolution but a few fused forms on GPU, and no integer one there. The
backward convolutions are transposes of the forward one, and take the same numbers as f32: the
transpose of a bf16 convolution rounds its result to bf16. Default precision (TF32 on GPU, one bf16
pass on TPU) multiplies them exactly.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.numerics import ScaledArray
from lowprec_jax.ops.operands import Operand
from lowprec_jax.ops.product import dequantized_operand
from lowprec_jax.recipes import Gemm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """The arguments of `jax.lax.conv_general_dilated` that are no arrays; hashable."""

    window_strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int
    out_sharding: Any

    def forward(self, lhs, rhs, **options) -> jax.Array:
        """The convolution; options are `precision` and `preferred_element_type`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return lax.conv_general_dilated(lhs, rhs, **fields, **options)

    def dgrad(self, grad, rhs, *, shape: tuple[int, ...], **options) -> jax.Array:
        """The gradient of lhs, f32 of this shape; operands are f32."""
        return _transpose(lambda lhs: self.forward(lhs, rhs, **options), grad, shape)

    def wgrad(self, lhs, grad, *, shape: tuple[int, ...], **options) -> jax.Array:
        """The gradient of rhs, f32 of this shape; operands are f32."""
        return _transpose(lambda rhs: self.forward(lhs, rhs, **options), grad, shape)

    @property
    def groups(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """By `Role`, the axes that the first product of an operand contracts, and the others.

        The second product contracts the others. See the table at the top.
        """
        lhs, rhs, out = self.dimension_numbers
        return (
            ((lhs[1],), (lhs[0], *lhs[2:])),
            ((*rhs[2:], rhs[1]), (rhs[0],)),
            ((out[1],), (out[0], *out[2:])),
        )


def _transpose(linear: Callable, grad: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    argument = compat.to_varying(jnp.zeros(shape, jnp.float32), compat.varying_axes(grad))
    return jax.linear_transpose(linear, argument)(grad)[0]


def multiply(
    convolve: Callable,
    left: Operand,
    right: Operand,
    gemm: Gemm | None,
    *,
    precision=None,
    backward: bool = False,
) -> jax.Array:
    """``left * right``, f32, with their scales.

    Args:
      convolve: a method of `Convolution`.
      left: an operand.
      right: an operand.
      gemm: how they were quantized.
      precision: of a product in high precision.
      backward: `convolve` takes f32 operands only.
    """
    if not (isinstance(left, ScaledArray) and isinstance(right, ScaledArray)):
        given = [x.dtype for x in (left, right) if not isinstance(x, ScaledArray)]
        dtype = jnp.float32 if backward else functools.reduce(jnp.promote_types, given)
        operands = (
            x.dequantize(dtype) if isinstance(x, ScaledArray) else x.astype(dtype)
            for x in (left, right)
        )
        return convolve(*operands, precision=precision, preferred_element_type=jnp.float32)
    assert gemm is not None
    assert gemm.left is not None
    assert gemm.right is not None
    exact = gemm.left.exact_in_bf16 and gemm.right.exact_in_bf16
    dtype = jnp.bfloat16 if exact and not backward else jnp.float32
    out = convolve(
        dequantized_operand(left, dtype),
        dequantized_operand(right, dtype),
        precision=None if exact else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out * (_tensor_scale(left) * _tensor_scale(right))


def _tensor_scale(x: ScaledArray) -> jax.Array:
    if x.per_tensor:
        return x.scale
    return jnp.float32(1) if x.global_scale is None else x.global_scale
