"""Random Hadamard transform: spreads an outlier over its block before quantizing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The fixed signs of Transformer Engine for blocks of 16.
_SIGNS_16 = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard_rotate(x: jax.Array, axis: int = -1, block: int = 16) -> jax.Array:
    """Rotates blocks along an axis: ``(x * signs) @ H / sqrt(block)``.

    `H` is Sylvester's Hadamard matrix, so the rotation is orthogonal: with both operands of a
    matmul rotated along the contracted axis it cancels in the product. The signs are fixed: those
    of Transformer Engine for blocks of 16, the Rudin-Shapiro sequence for others. They spread a
    constant block (of 4 or more) as well, which plain `H` would gather in one element.

    Args:
      x: float array.
      axis: axis to rotate along; its length is a multiple of `block`.
      block: a power of two.

    Returns:
      Array of the shape and type of `x`, computed in f32.

    Raises:
      ValueError: `block` is not a power of two, or does not divide the axis.

    Source: arXiv:2509.25149, section 4.3; transformer_engine/jax/quantize/hadamard.py.
    Differs from: that source, whose matrix is bf16, which is the same where the root is exact
      (blocks of 4, 16, 64).
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"hadamard_rotate: block is {block}; use a power of two.")
    n = x.shape[axis]
    if n % block:
        raise ValueError(
            f"hadamard_rotate: axis {axis} of {x.shape} has length {n}, not a multiple of block "
            f"{block}; pad it with zeros."
        )
    axis %= x.ndim
    before, after = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    tiles = x.astype(jnp.float32).reshape(before * (n // block), block, after)
    # Two forms, as XLA:CPU needs ten times as long for a matmul with transposed operands.
    order = "bjn,ji->bin" if after == 1 else "ji,bjn->bin"
    operands = (tiles, _matrix(block)) if after == 1 else (_matrix(block), tiles)
    rotated = jnp.einsum(order, *operands, precision=lax.Precision.HIGHEST)
    return rotated.reshape(x.shape).astype(x.dtype)


@functools.cache
def _matrix(block: int) -> np.ndarray:
    """``diag(signs) @ H / sqrt(block)``, f32 [block, block]."""
    index = np.arange(block)
    signs = np.array(_SIGNS_16) if block == 16 else _parity_sign(index & (index >> 1))
    hadamard = _parity_sign(index[:, None] & index)
    return (signs[:, None] * hadamard / math.sqrt(block)).astype(np.float32)


def _parity_sign(bits: np.ndarray) -> np.ndarray:
    """-1 where the number of set bits is odd, else 1."""
    return 1 - 2 * (np.bitwise_count(bits) & 1).astype(np.int64)
