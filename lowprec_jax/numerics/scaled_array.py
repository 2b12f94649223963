"""A quantized tensor: codes and the scale that turns them back, as one pytree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lowprec_jax.numerics.casting import Rounding, cast, upcast
from lowprec_jax.numerics.formats import Format, get_format
from lowprec_jax.numerics.scaling import compute_amax, reciprocal, scale_from_amax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data", "scale"], meta_fields=["format"]
)
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """A tensor in low precision, ``x ≈ data * scale``.

    Attributes:
      data: codes, of type ``format.dtype`` and the shape of the tensor.
      scale: f32, rank 0 for one scale per tensor, or a shape that broadcasts against `data`.
      format: the format of `data` (static).
    """

    data: jax.Array
    scale: jax.Array
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.data.shape

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """``data * scale``, computed in f32, as `dtype`."""
        return dequantize(self, dtype)


def quantize(
    x: jax.Array,
    fmt: Format | str,
    scale: jax.Array | None = None,
    *,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> ScaledArray:
    """Quantizes a tensor: ``data = cast(x * (1 / scale))``, in f32 whatever the type of `x`.

    Args:
      x: float array.
      fmt: target format or its name.
      scale: f32 > 0, broadcastable to `x`; None takes the tensor's own amax (current scaling; a
        tensor of zeros has scale 1).
      rounding: see `cast`.
      key: PRNG key for stochastic rounding.

    Returns:
      The scaled array.

    Differs from: Flax `fp8_ops`, which quantizes bf16 data in bf16: 3.7 % of the codes differ.
    """
    fmt = get_format(fmt)
    if scale is None:
        scale = scale_from_amax(compute_amax(x), fmt)
    data = cast(x.astype(jnp.float32) * reciprocal(scale), fmt, rounding=rounding, key=key)
    return ScaledArray(data, scale, fmt)


def dequantize(x: ScaledArray, dtype=jnp.float32) -> jax.Array:
    """``data * scale``, computed in f32, as `dtype`."""
    return (upcast(x.data, jnp.float32) * x.scale).astype(dtype)


def fake_quantize(
    x: jax.Array,
    fmt: Format | str,
    scale: jax.Array | None = None,
    *,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    """What is left of a tensor after quantizing it: ``dequantize(quantize(x))`` in its own type."""
    return quantize(x, fmt, scale, rounding=rounding, key=key).dequantize(x.dtype)
