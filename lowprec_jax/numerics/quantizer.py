"""How a tensor becomes codes and scales: format, tiles, scale rule, rounding, as one value."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.numerics.block_scales import (
    E8M0_RULES,
    divide,
    e8m0_code,
    e8m0_value,
    nvfp4_scales,
)
from lowprec_jax.numerics.casting import Rounding, cast_with_values, decode
from lowprec_jax.numerics.formats import Format
from lowprec_jax.numerics.hadamard import hadamard_rotate
from lowprec_jax.numerics.scaled_array import ScaledArray
from lowprec_jax.numerics.scaling import (
    compute_amax,
    reciprocal,
    round_up_to_power_of_two,
    scale_from_amax,
)
from lowprec_jax.numerics.tiles import Tile, merge, scale_shape, split

ScaleRule = Literal["float", "power_of_two", "floor", "ceil", "rceil", "even", "nvfp4", "one"]

_NVFP4_SCALE_MAX = 448.0
# A tile whose amax is mapped onto 4 has a scale half as large again, which e4m3 has to hold.
_FOUR_OVER_SIX_SCALE_MAX = 256.0


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one operand of a matmul is quantized. Hashable and static under jit.

    A scale covers `contract` elements along the contracted axis and `free` along a free one:

    =============  ==========  ======  ==================================
    granularity    contract    free    used by
    =============  ==========  ======  ==================================
    tensor         None        None    delayed and current FP8
    row, channel   None        1       row-wise FP8, INT8
    1 x B          B           1       DeepSeek activations, MX, NVFP4
    B x B          B           B       DeepSeek and NVFP4 weights
    =============  ==========  ======  ==================================

    Attributes:
      format: format of the codes.
      contract: elements per scale along the contracted axis; None: all, over all contracted axes.
        Of several contracted axes the last is cut into blocks, the others have a scale each.
      free: elements per scale along the free axes, likewise. Batch axes have a scale each, unless
        the scale is that of the tensor.
      scale: "float", the f32 scale of the amax; "power_of_two", rounded up to one; "floor", "ceil",
        "rceil" or "even", an E8M0 scale (OCP MX 1.0; "rceil" is NVIDIA's, arXiv:2506.08027);
        "nvfp4", e4m3 scales under one f32 scale per tensor (arXiv:2509.25149); "one", no scaling.
      scale_min: smallest e4m3 scale of NVFP4; see `nvfp4_scales`.
      margin: powers of two of head-room; "float" and "power_of_two" only.
      rounding: "nearest" or "stochastic".
      hadamard: rotate blocks of this many elements along the contracted axis before quantizing; 0
        for none. Both operands of a matmul have to agree.
      four_over_six: NVFP4: tiles choose to map their amax onto 6 or onto 4 by the smaller mean
        absolute error (arXiv:2512.02010).
      axes: "own": tiles lie along the contracted axis of the GEMM they are for; "forward": along
        that of the forward GEMM, so that backward GEMMs use the same codes (fake quantization).

    Raises:
      ValueError: values or combinations that mean nothing.
    """

    format: Format
    contract: int | None = None
    free: int | None = None
    scale: ScaleRule = "float"
    scale_min: float = 2.0**-9
    margin: int = 0
    rounding: Rounding = "nearest"
    hadamard: int = 0
    four_over_six: bool = False
    axes: Literal["own", "forward"] = "own"

    def __post_init__(self):
        for field in ("contract", "free"):
            size = getattr(self, field)
            if size is not None and size < 1:
                raise ValueError(f"Quantizer: {field} is {size}; use 1 or more, or None for all.")
        known = ("float", "power_of_two", *E8M0_RULES, "nvfp4", "one")
        if self.scale not in known:
            raise ValueError(f"Quantizer: scale is {self.scale!r}; use one of {', '.join(known)}.")
        if self.margin and self.scale not in ("float", "power_of_two"):
            raise ValueError(
                f"Quantizer: margin {self.margin} with scale {self.scale!r}; a margin is for "
                "'float' and 'power_of_two' scales."
            )
        if self.four_over_six and self.scale != "nvfp4":
            raise ValueError("Quantizer: four_over_six is a choice among 'nvfp4' scales.")
        if self.hadamard and self.hadamard & (self.hadamard - 1):
            raise ValueError(f"Quantizer: hadamard is {self.hadamard}; use a power of two.")

    @property
    def per_tensor(self) -> bool:
        """Whether one scale stands for the whole tensor."""
        return self.contract is None and self.free is None

    @property
    def needs_tensor_amax(self) -> bool:
        """Whether scales depend on the amax of the whole tensor."""
        return self.scale == "nvfp4" or (self.per_tensor and self.scale != "one")

    @property
    def exact_in_bf16(self) -> bool:
        """Whether bf16 holds code times scale exactly; the scale of the tensor is left out."""
        if self.scale == "nvfp4":
            return self.format.mantissa_bits <= 3
        powers = self.scale in ("power_of_two", "one", *E8M0_RULES)
        return self.format.exact_in_bf16 and (powers or self.per_tensor)

    def tile(self, shape: tuple[int, ...], contracted: Sequence[int], free: Sequence[int]) -> Tile:
        """Elements per scale along each axis; empty for one scale per tensor.

        Args:
          shape: shape of the operand.
          contracted: its contracted axes, in the order of the dimension numbers.
          free: its free axes.
        """
        if self.per_tensor:
            return ()
        tile = [1] * len(shape)
        for axes, size in ((contracted, self.contract), (free, self.free)):
            if size is None:
                for axis in axes:
                    tile[axis] = max(1, shape[axis])
            elif axes:
                tile[axes[-1]] = size
        return tuple(tile)

    def scales(
        self, amax: jax.Array, tensor_amax: jax.Array | None = None, *, element_max=None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The scales of tiles with these amaxes, f32, and the scale of the tensor or None.

        A format without NaN has it in the scale: what a tile with a NaN dequantizes to is NaN.

        Args:
          amax: f32, any shape.
          tensor_amax: f32 [], for two levels.
          element_max: what amaxes are mapped onto, if not the largest element.
        """
        if self.scale == "one":
            return jnp.ones_like(amax), None
        if self.scale == "nvfp4":
            assert tensor_amax is not None
            limit = _FOUR_OVER_SIX_SCALE_MAX if self.four_over_six else _NVFP4_SCALE_MAX
            return nvfp4_scales(
                amax,
                tensor_amax,
                self.format,
                element_max=element_max,
                scale_max=limit,
                scale_min=self.scale_min,
            )
        if self.scale in E8M0_RULES:
            return e8m0_value(e8m0_code(amax, self.format, self.scale)), None
        scale = scale_from_amax(amax, self.format, margin=self.margin)
        if self.scale == "power_of_two":
            scale = round_up_to_power_of_two(scale)
        if self.format.nan_code is None:
            scale = jnp.where(jnp.isnan(amax), jnp.nan, scale)
        return scale, None

    def __call__(
        self,
        x: jax.Array,
        tile: Tile = (),
        *,
        tensor_amax: jax.Array | None = None,
        scale: jax.Array | None = None,
        factor: jax.Array | None = None,
        key: jax.Array | None = None,
        with_values: bool = False,
    ) -> ScaledArray:
        """Quantizes a tensor.

        Args:
          x: float array; rotated already if there is a rotation (`rotate`).
          tile: what `tile` returns for it.
          tensor_amax: amax of the tensor, f32 []; None: that of `x`. Given where devices hold parts
            of the tensor.
          scale: scale of the tensor, f32 [], where it is known (delayed scaling).
          factor: its `reciprocal`, where that is known too.
          key: PRNG key, for stochastic rounding.
          with_values: add `ScaledArray.values`, for a matmul that follows at once.

        Returns:
          The codes, with a scale for each tile.
        """
        if self.needs_tensor_amax and tensor_amax is None and scale is None:
            tensor_amax = compute_amax(x)
        if self.per_tensor:
            if scale is None:
                scale, _ = self.scales(jnp.float32(1) if tensor_amax is None else tensor_amax)
            factor = reciprocal(scale) if factor is None else factor
            codes, values = cast_with_values(
                lax.mul(lax.convert_element_type(x, jnp.float32), factor),
                self.format,
                rounding=self.rounding,
                key=key,
            )
            return ScaledArray(codes, scale, self.format, values=values if with_values else None)
        view, within = split(x.astype(jnp.float32), tile)
        amax = compute_amax(view, within)
        codes, values, scale, whole = self._encode(view, amax, tensor_amax, key)
        if self.four_over_six:
            other, _, larger, _ = self._encode(view, amax, tensor_amax, key, element_max=4.0)
            assert whole is not None
            in_scales = view * reciprocal(whole)
            better = _error(in_scales, other, larger, within, self.format) < _error(
                in_scales, codes, scale, within, self.format
            )
            codes, scale = jnp.where(better, other, codes), jnp.where(better, larger, scale)
            values = None
        return ScaledArray(
            merge(codes, x.shape),
            scale.reshape(scale_shape(x.shape, tile)),
            self.format,
            tile,
            whole,
            merge(values, x.shape) if with_values and values is not None else None,
        )

    def _encode(self, view, amax, tensor_amax, key, element_max=None):
        scale, whole = self.scales(amax, tensor_amax, element_max=element_max)
        factor = (
            reciprocal(scale) if whole is None else divide(divide(jnp.float32(1), whole), scale)
        )
        # The barrier keeps the arithmetic of scales out of the loop over the elements.
        factor = lax.optimization_barrier(factor)
        codes, values = cast_with_values(
            view * factor, self.format, rounding=self.rounding, key=key
        )
        return codes, values, scale, whole

    def rotate(self, x: jax.Array, contracted: Sequence[int]) -> jax.Array:
        """`x` after the Hadamard rotation along its last contracted axis, if there is one.

        The axis is padded with zeros to whole blocks, and stays so: rotated, they are not zeros.
        """
        if not self.hadamard or not contracted:
            return x
        axis = contracted[-1]
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, -x.shape[axis] % self.hadamard)
        return hadamard_rotate(jnp.pad(x, padding), axis, self.hadamard)


def as_quantizer(x: Quantizer | Format | None) -> Quantizer | None:
    """A format stands for codes with one scale per tensor, None for high precision."""
    return Quantizer(x) if isinstance(x, Format) else x


def _error(x, codes, scale, within, fmt: Format) -> jax.Array:
    """Absolute error of each tile, in units of the scale of the tensor."""
    return jnp.sum(jnp.abs(decode(codes, fmt) * scale - x), axis=within, keepdims=True)
