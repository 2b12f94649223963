"""A frozen kernel stored in few bits under trainable adapters of low rank: LoRA and QLoRA.

The kernel is a dict of arrays that every checkpoint tool can hold: codes as bytes, two of four bits
in one, and scales as small as their recipe allows.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.errors import UserError
from lowprec_jax.numerics import (
    E4M3FN,
    E8M0_RULES,
    Quantizer,
    ScaledArray,
    cast,
    e8m0_value,
    pack_4bit,
    unpack_4bit,
)
from lowprec_jax.recipes import Recipe, get_recipe

# Initialisers of the adapters: the sum starts as the base alone.
LORA_A_INIT = jax.nn.initializers.he_uniform()
LORA_B_INIT = jax.nn.initializers.zeros

Stored = Mapping[str, jax.Array]


def store_kernel(kernel: jax.Array, recipe: Recipe | str) -> dict[str, jax.Array]:
    """A kernel quantized as a recipe quantizes weights in the forward pass.

    Bytes per parameter, of large kernels: ``nf4_weights`` 0.5625 (four bits and an f32 scale for
    64), ``int4_weights`` 0.53, ``mxfp4`` 0.53, ``nvfp4`` 0.504, ``mxfp8`` 1.03, ``int8`` and FP8
    recipes 1.

    Args:
      kernel: float [inputs, outputs].
      recipe: a recipe or its name. Scales come from the kernel, under delayed scaling too.

    Returns:
      ``codes``, uint8 (two codes of four bits in a byte, along the inputs; codes of more than eight
      bits int16 or uint16), ``scale``, uint8 for E8M0 and e4m3 scales, else f32, and for two levels
      ``global_scale``, f32 [].

    Raises:
      UserError: the recipe leaves weights in high precision.

    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3.
    Differs from: that source, whose blocks of 64 lie along the kernel in memory, not along the
      inputs, and which quantizes the scales too (0.52 bytes per parameter).
    """
    quantizer = weight_quantizer(recipe)
    quantized = quantizer(kernel, quantizer.tile(kernel.shape, (0,), (1,)))
    codes = quantized.data
    if jnp.issubdtype(codes.dtype, jnp.floating) or codes.dtype == jnp.int8:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    if quantized.format.bits <= 4:
        codes = pack_4bit(jnp.pad(codes, ((0, codes.shape[0] % 2), (0, 0))), axis=0)
    stored = {"codes": codes, "scale": _pack_scale(quantized.scale, quantizer)}
    if quantized.global_scale is not None:
        stored["global_scale"] = quantized.global_scale
    return stored


def read_kernel(
    stored: Stored, recipe: Recipe | str, shape: tuple[int, int], dtype=jnp.float32
) -> jax.Array:
    """The kernel that `store_kernel` stored, dequantized.

    Args:
      stored: what it returned.
      recipe: the recipe it was given.
      shape: shape of the kernel.
      dtype: type of the result.
    """
    quantizer = weight_quantizer(recipe)
    fmt, codes = quantizer.format, stored["codes"]
    if fmt.bits <= 4:
        codes = unpack_4bit(codes, signed=fmt.dtype == jnp.int8, axis=0)[: shape[0]]
    if codes.dtype != fmt.dtype:
        codes = lax.bitcast_convert_type(codes, fmt.dtype)
    scale = _unpack_scale(stored["scale"], quantizer)
    tile = quantizer.tile(shape, (0,), (1,))
    return ScaledArray(codes, scale, fmt, tile, stored.get("global_scale")).dequantize(dtype)


def lora_dense(
    x: jax.Array,
    stored: Stored,
    lora_a: jax.Array,
    lora_b: jax.Array,
    *,
    recipe: Recipe | str,
    scaling: float,
    bias: jax.Array | None = None,
    dtype=None,
    precision=None,
) -> jax.Array:
    """``x W + (x A) B * scaling``, with the base W dequantized to the compute type.

    The backward pass keeps the stored base and dequantizes it again: no kernel in high precision
    lives between the two. The base and the bias get no gradient; `x` gets it through both terms.

    Args:
      x: float [..., inputs].
      stored: W, from `store_kernel`.
      lora_a: A, float [inputs, rank].
      lora_b: B, float [rank, outputs].
      recipe: how W is stored.
      scaling: alpha / rank.
      bias: float [outputs], frozen.
      dtype: compute type; default: the promoted type of `x` and the adapters.
      precision: of the matmuls.

    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685, section 4.1; QLoRA, equation 5.
    """
    dtype = dtype or jnp.promote_types(x.dtype, lora_a.dtype)
    x, lora_a, lora_b = (y.astype(dtype) for y in (x, lora_a, lora_b))
    shape = (lora_a.shape[0], lora_b.shape[1])

    def base(x: jax.Array, stored: Stored) -> jax.Array:
        return jnp.dot(x, read_kernel(stored, recipe, shape, dtype), precision=precision)

    out = jax.checkpoint(base)(x, lax.stop_gradient(dict(stored)))
    adapted = jnp.dot(jnp.dot(x, lora_a, precision=precision), lora_b, precision=precision)
    out = out + adapted * scaling
    return out if bias is None else out + lax.stop_gradient(bias).astype(dtype)


def stored_bytes(stored: Stored) -> int:
    """Bytes of a stored kernel."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in stored.values())


def weight_quantizer(recipe: Recipe | str) -> Quantizer:
    """How a recipe quantizes weights in the forward pass.

    Raises:
      UserError: it leaves them in high precision, or rotates them.
    """
    recipe = get_recipe(recipe)
    fwd = recipe.gemm("fwd")
    if fwd is None or fwd.right is None or fwd.right.hadamard:
        raise UserError(
            f"LoRA: recipe {recipe.name!r} does not say how a kernel is stored; use one that "
            "quantizes weights in the forward pass, such as 'nf4_weights', 'int4_weights', "
            "'mxfp4', 'int8' or 'fp8_rowwise'."
        )
    return fwd.right


def _pack_scale(scale: jax.Array, quantizer: Quantizer) -> jax.Array:
    if quantizer.scale in E8M0_RULES:
        return (lax.bitcast_convert_type(scale, jnp.uint32) >> 23).astype(jnp.uint8)
    if quantizer.scale == "nvfp4":
        return lax.bitcast_convert_type(cast(scale, E4M3FN), jnp.uint8)
    return scale


def _unpack_scale(scale: jax.Array, quantizer: Quantizer) -> jax.Array:
    if quantizer.scale in E8M0_RULES:
        return e8m0_value(scale)
    if quantizer.scale == "nvfp4":
        return lax.bitcast_convert_type(scale, E4M3FN.dtype).astype(jnp.float32)
    return scale
