"""A quantized tensor: codes and the scales that turn them back, as one pytree."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowprec_jax.numerics.casting import Rounding, cast, decode
from lowprec_jax.numerics.formats import Format, get_format
from lowprec_jax.numerics.scaling import compute_amax, reciprocal, scale_from_amax
from lowprec_jax.numerics.tiles import Tile, spread
from lowprec_jax.numerics.transpose import transpose


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "global_scale", "values"],
    meta_fields=["format", "tile"],
)
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """A tensor in low precision, ``x ≈ data * scale``.

    Attributes:
      data: codes, of type ``format.dtype`` and the shape of the tensor.
      scale: f32, rank 0 for one scale per tensor, or of the rank of `data` with as many entries
        along each axis as there are tiles.
      format: the format of `data` (static).
      tile: elements along each axis that share a scale (static), aligned to the last axes; needed
        for axes that have neither one scale nor one for each element.
      global_scale: f32 [], the second level of NVFP4; None for one level.
      values: f32, what `data` stands for without scales, where it was just rounded: a matmul that
        upcasts takes these, and XLA drops what is not used. None: decode `data`.
    """

    data: jax.Array
    scale: jax.Array
    format: Format
    tile: Tile = ()
    global_scale: jax.Array | None = None
    values: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.data.shape

    @property
    def per_tensor(self) -> bool:
        """Whether one scale stands for the whole tensor."""
        return self.scale.ndim == 0

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """``data * scale``, computed in f32, as `dtype`."""
        return dequantize(self, dtype)

    def transpose(self, order: Sequence[int]) -> "ScaledArray":
        """The tensor with its axes in another order."""
        order = tuple(order)
        scale = self.scale if self.per_tensor else self.scale.transpose(order)
        tile = tuple(self.tile[axis] for axis in order) if self.tile else ()
        return dataclasses.replace(
            self.with_data(transpose(self.data, order)), scale=scale, tile=tile
        )

    def with_data(self, data: jax.Array) -> "ScaledArray":
        """The same with these codes, without `values`."""
        return dataclasses.replace(self, data=data, values=None)


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
    values = decode(x.data, x.format) * spread(x.scale, x.shape, x.tile)
    if x.global_scale is not None:
        values = values * x.global_scale
    return values.astype(dtype)


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
