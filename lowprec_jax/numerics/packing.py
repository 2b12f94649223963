"""Two 4-bit codes in a byte, the even element in the low nibble, as in NVFP4 and MXFP4 files."""

import jax
import jax.numpy as jnp
from jax import lax


def pack_4bit(codes: jax.Array, axis: int = -1) -> jax.Array:
    """Packs neighbours along an axis.

    Args:
      codes: uint8 or int8, any shape; the low four bits count (of int8: two's complement).
      axis: axis of even length.

    Returns:
      uint8, half as long along `axis`.

    Raises:
      TypeError: `codes` is neither uint8 nor int8.
      ValueError: the axis has odd length.
    """
    _check_bytes("pack_4bit", codes, (jnp.uint8, jnp.int8))
    n = codes.shape[axis]
    if n % 2:
        raise ValueError(
            f"pack_4bit: axis {axis} of {codes.shape} has odd length {n}; pad it with one zero."
        )
    nibbles = lax.bitcast_convert_type(codes, jnp.uint8) & 0xF
    low, high = (lax.slice_in_dim(nibbles, start, n, 2, axis % codes.ndim) for start in (0, 1))
    return low | (high << 4)


def unpack_4bit(packed: jax.Array, *, signed: bool = False, axis: int = -1) -> jax.Array:
    """The inverse of `pack_4bit`.

    Args:
      packed: uint8, any shape.
      signed: whether codes are two's complement (int4) and come back as int8; else uint8.
      axis: the axis they are packed along.

    Returns:
      uint8 or int8, twice as long along `axis`.

    Raises:
      TypeError: `packed` is not uint8.
    """
    _check_bytes("unpack_4bit", packed, (jnp.uint8,))
    axis %= packed.ndim
    codes = jnp.stack([packed & 0xF, packed >> 4], axis=axis + 1)
    codes = codes.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])
    if not signed:
        return codes
    return lax.bitcast_convert_type(codes << 4, jnp.int8) >> 4  # the arithmetic shift copies bit 3


def _check_bytes(function: str, x: jax.Array, allowed) -> None:
    if x.dtype not in allowed:
        names = " or ".join(jnp.dtype(d).name for d in allowed)
        raise TypeError(f"{function}: got {x.dtype}; pass {names} (4-bit types: astype first).")
