"""Block-scaled matmuls in the form that accelerators execute.

Blocks with f32 scales: one matmul of codes per block of the contraction, each scaled and added in
f32, which is what DeepSeek's kernels compute. E8M0 and NVFP4 blocks: XLA's block-scaled dot, which
Blackwell multiplies as it is. It is used where the chip is known to have it, since JAX 0.10 cannot
lower a program with it for several platforms at once.

Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.numerics import E4M3FN, E8M0_RULES, E8M0FNU, ScaledArray, spread
from lowprec_jax.ops import backends
from lowprec_jax.ops.dimensions import DotDimensions
from lowprec_jax.recipes import Gemm


def multiply_blocks(
    left: ScaledArray,
    right: ScaledArray,
    gemm: Gemm,
    dimensions: DotDimensions,
    backend: str | None,
) -> jax.Array | None:
    """``left x right``, f32, without the scales of the tensors; None where there is no such form.

    Args:
      left: an operand with scales in blocks along its last contracted axis.
      right: the same.
      gemm: how they were quantized.
      dimensions: as in `jax.lax.dot_general`.
      backend: "block_scaled" if the chip multiplies E8M0 and NVFP4 blocks; a backend for studies
        multiplies the codes of each block.
    """
    assert gemm.left is not None
    assert gemm.right is not None
    formats = left.format, right.format
    block = gemm.left.contract
    (contracted_left, contracted_right), (batch_left, batch_right) = dimensions
    sizes = [x.shape[axes[-1]] for x, axes in ((left, contracted_left), (right, contracted_right))]
    if block is None or block != gemm.right.contract or sizes[0] % block or not sizes[0]:
        return None
    study = backends.is_study(backend)
    scale_dtype = None if study else _scale_dtype(gemm)
    if scale_dtype and backend != "block_scaled":
        return None
    if not (study or backends.multiplies_natively(formats)):
        return None
    lhs, lhs_scale, lhs_shape = _matrices(left, contracted_left, batch_left, block)
    rhs, rhs_scale, rhs_shape = _matrices(right, contracted_right, batch_right, block)
    if scale_dtype is None:
        codes_dot = functools.partial(
            backends.dot, formats=formats, backend=backend if study else "native"
        )
        out = _one_by_one(lhs, lhs_scale, rhs, rhs_scale, codes_dot)
    else:
        lhs, rhs = (backends.as_native(x, f) for x, f in zip((lhs, rhs), formats, strict=True))
        out = _scaled_dot(lhs, lhs_scale, rhs, rhs_scale, scale_dtype)
    out = compat.to_varying(out, compat.varying_axes(lhs) | compat.varying_axes(rhs))
    batch = tuple(left.shape[axis] for axis in batch_left)
    return out.reshape((*batch, *lhs_shape, *rhs_shape))


def _scale_dtype(gemm: Gemm):
    """The type of the scales of a block-scaled dot; None for f32 scales."""
    rules = {side.scale for side in (gemm.left, gemm.right) if side is not None}
    if rules <= set(E8M0_RULES):
        return E8M0FNU.dtype
    return E4M3FN.dtype if rules == {"nvfp4"} else None


def _matrices(x: ScaledArray, contracted, batch, block: int):
    """Codes [G, M, K], scales [G, M, K / block], and the free part of the shape."""
    free = tuple(i for i in range(x.data.ndim) if i not in (*contracted, *batch))
    order = (*batch, *free, *contracted)
    x = x.transpose(order)
    n_batch, n_free = len(batch), len(free)
    last = x.data.ndim - 1
    blocks = (*x.shape[:last], x.shape[last] // block)
    others = (*(x.tile or (1,) * x.data.ndim)[:last], 1)  # the last axis is in blocks already
    scale = jnp.broadcast_to(spread(x.scale, blocks, others), blocks)
    rows = [math.prod(x.shape[:n_batch]), math.prod(x.shape[n_batch : n_batch + n_free])]
    codes = x.data.reshape(*rows, -1)
    return codes, scale.reshape(*rows, -1), x.shape[n_batch : n_batch + n_free]


def _scaled_dot(lhs, lhs_scale, rhs, rhs_scale, dtype) -> jax.Array:
    return lax.scaled_dot(
        lhs,
        rhs.swapaxes(1, 2),
        lhs_scale=lhs_scale.astype(dtype),
        rhs_scale=rhs_scale.swapaxes(1, 2).astype(dtype),
        preferred_element_type=jnp.float32,
    )


def _one_by_one(lhs, lhs_scale, rhs, rhs_scale, codes_dot) -> jax.Array:
    """[G, M, N] from codes [G, M, K] and [G, N, K], a block of K at a time."""
    n_blocks = lhs_scale.shape[-1]

    def in_blocks(x):
        blocks = x.reshape(*x.shape[:2], n_blocks, -1)
        return jnp.moveaxis(blocks, 2, 0)

    def add(total, block):
        lhs, lhs_scale, rhs, rhs_scale = block
        partial = codes_dot(lhs, rhs, (((2,), (2,)), ((0,), (0,))))
        return total + partial * lhs_scale * rhs_scale.swapaxes(1, 2), None

    blocks = tuple(map(in_blocks, (lhs, lhs_scale, rhs, rhs_scale)))
    zeros = lhs_scale[:, :, :1] * 0 * rhs_scale[:, :, :1].swapaxes(1, 2) * 0
    return lax.scan(add, zeros, blocks)[0]
