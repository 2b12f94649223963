"""OCP microscaling (MX): blocks of element codes, each with a power-of-two scale, as stored."""

import jax
import jax.numpy as jnp

from lowprec_jax.numerics.block_scales import E8M0Rule, e8m0_code, scale_down, scale_up
from lowprec_jax.numerics.casting import Rounding, cast, decode
from lowprec_jax.numerics.formats import Format, get_format
from lowprec_jax.numerics.scaling import compute_amax
from lowprec_jax.numerics.tiles import Tile, merge, scale_shape, split, spread


def quantize_mx(
    x: jax.Array,
    fmt: Format | str,
    rule: E8M0Rule = "rceil",
    *,
    block: int = 32,
    axis: int = -1,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes blocks along an axis, each with its own scale.

    The storage form: bytes as other libraries and checkpoints have them. A block with a NaN or an
    Inf has the NaN scale 255, and dequantizes to NaN. A block is as exact at 1e-38 as at 1.

    Args:
      x: float array; the last block is padded with zeros, and trimmed again.
      fmt: element format or its name.
      rule: how the scale follows from the block's amax; see `e8m0_code`.
      block: elements per scale; OCP MX 1.0 has 32.
      axis: axis that blocks lie along.
      rounding: see `cast`.
      key: PRNG key for stochastic rounding.

    Returns:
      Codes, of ``fmt.dtype`` and the shape of `x`, and E8M0 scale codes, uint8, with one entry for
      each block along `axis`.

    Raises:
      ValueError: `block` is below 1, or no such rule or format.

    Source: OCP Microscaling Formats (MX) 1.0; `to_mx` of torchao, to which codes and scales are
      equal bit for bit, with two exceptions.
    Differs from: torchao in blocks with scale code 0 (amax below about 2**-119 for e4m3fn): it
      stores 2**-127 but divides by 2**-126, or by 1 under "rceil"; and in blocks that are not
      finite, whose scale it leaves finite for an Inf.
    """
    fmt = get_format(fmt)
    tile = _tile(x.ndim, block, axis)
    view, within = split(x.astype(jnp.float32), tile)
    amax = compute_amax(view, within)
    scale = e8m0_code(jnp.where(amax < jnp.inf, amax, jnp.nan), fmt, rule)
    codes = cast(scale_down(view, scale), fmt, rounding=rounding, key=key)
    return merge(codes, x.shape), scale.reshape(scale_shape(x.shape, tile))


def dequantize_mx(
    codes: jax.Array,
    scale_codes: jax.Array,
    fmt: Format | str,
    *,
    block: int = 32,
    axis: int = -1,
) -> jax.Array:
    """The values of what `quantize_mx` returns, f32, exact: products may be subnormal."""
    scale = spread(scale_codes, codes.shape, _tile(codes.ndim, block, axis))
    return scale_up(decode(codes, get_format(fmt)), scale)


def _tile(ndim: int, block: int, axis: int) -> Tile:
    if block < 1:
        raise ValueError(f"MX: block is {block}; use 1 or more (OCP MX has 32).")
    return tuple(block if i == axis % ndim else 1 for i in range(ndim))
