"""NVFP4: blocks of 16 e2m1 codes, an e4m3 scale for each and one f32 scale, as stored."""

import jax
import jax.numpy as jnp

from lowprec_jax.numerics.casting import Rounding, cast, decode
from lowprec_jax.numerics.formats import E2M1, E4M3FN
from lowprec_jax.numerics.quantizer import Quantizer
from lowprec_jax.numerics.scaling import compute_amax
from lowprec_jax.numerics.tiles import Tile, split, spread

_BLOCK = 16


def quantize_nvfp4(
    x: jax.Array,
    *,
    four_over_six: bool = False,
    axis: int = -1,
    scale_min: float = 2.0**-9,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes blocks of 16 along an axis to ``code * scale * global_scale``.

    The storage form, before two codes are packed in a byte (`pack_4bit`). A block with a NaN or an
    Inf has scale NaN and dequantizes to NaN; the others are scaled as if it were not there.

    Args:
      x: float array; the last block is padded with zeros, and trimmed again.
      four_over_six: let each block map its amax onto 6 or onto 4, whichever has the smaller mean
        absolute error (6 if equal; arXiv:2512.02010). The values of e2m1 near 6 are coarse: 5 is
        between 4 and 6.
      axis: axis that blocks lie along.
      scale_min: smallest block scale; see `nvfp4_scales`. 2**-6 for the bytes of torchao.
      rounding: see `cast`.
      key: PRNG key for stochastic rounding.

    Returns:
      Codes, uint8 of the shape of `x`; scale codes, e4m3fn with one entry for each block along
      `axis`; the global scale, f32 [].

    Source: arXiv:2509.25149; `nvfp4_quantize` of torchao.
    """
    quantizer = Quantizer(
        E2M1,
        contract=_BLOCK,
        free=1,
        scale="nvfp4",
        scale_min=scale_min,
        rounding=rounding,
        four_over_six=four_over_six,
    )
    tile = _tile(x.ndim, axis)
    view, within = split(x.astype(jnp.float32), tile)
    amax = compute_amax(view, within)
    tensor_amax = jnp.max(jnp.where(amax < jnp.inf, amax, 0), initial=0)
    quantized = quantizer(x, tile, tensor_amax=tensor_amax, key=key)
    assert quantized.global_scale is not None
    return quantized.data, cast(quantized.scale, E4M3FN), quantized.global_scale


def dequantize_nvfp4(
    codes: jax.Array, scale_codes: jax.Array, global_scale: jax.Array, *, axis: int = -1
) -> jax.Array:
    """The values of what `quantize_nvfp4` returns: ``code * scale * global_scale``, f32."""
    scale = spread(scale_codes.astype(jnp.float32), codes.shape, _tile(codes.ndim, axis))
    return decode(codes, E2M1) * scale * global_scale


def _tile(ndim: int, axis: int) -> Tile:
    return tuple(_BLOCK if i == axis % ndim else 1 for i in range(ndim))
