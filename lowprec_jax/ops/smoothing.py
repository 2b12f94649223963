"""Smoothing: outlier channels of a matmul's input share their range with the rows of the kernel.

A trained SwiGLU has channels whose gate and up weights are aligned, so that their output grows with
the square of the input. With one scale per tensor such a channel takes the resolution of all
others. A power of two per channel moves half of its range, in octaves, into the kernel's row.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.errors import UserError
from lowprec_jax.numerics import compute_amax
from lowprec_jax.ops.dot_general import dot_general
from lowprec_jax.ops.gather import Gather, gather
from lowprec_jax.ops.known_amax import with_known_amax
from lowprec_jax.ops.operands import largest_amax
from lowprec_jax.recipes import Recipe, Role, get_recipe

# Factors are 2**-14 to 2**14: normal numbers of f16.
_LARGEST_RATIO = 2.0**28


def smooth_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers,
    *args,
    recipe: Recipe | str,
    state=None,
    rhs_gather: Gather | None = None,
    **kwargs,
) -> jax.Array:
    """`dot_general` of ``lhs * s`` and ``rhs / s``, with a power of two ``s`` for each channel.

    The factors come from the operands of this very call. So do the scales, under delayed scaling
    too: a channel that grows from one step to the next never saturates.

    Without quantization the result is that of the plain product, bit for bit (in f16: unless small
    numbers become subnormal). Scales in blocks gain less: they do not mix all channels.

    Args:
      lhs: float array, the activations.
      rhs: float array, the kernel.
      dimension_numbers: as in `jax.lax.dot_general`, with one contracted axis.
      *args: see `dot_general`.
      recipe: a recipe or its name.
      state: scaling state of this call site.
      rhs_gather: how the kernel is sharded; it is gathered in high precision.
      **kwargs: see `dot_general`.

    Raises:
      UserError: not one contracted axis, of equal size in both.

    Source: Fishman et al. 2024 (Smooth-SwiGLU), arXiv:2409.12517; SmoothQuant, arXiv:2211.10438,
      equation 4, with alpha 0.5.
    Differs from: Smooth-SwiGLU, whose factor is the whole range of a channel. In a matmul of codes
      the kernel then underflows where the activations did.
    """
    recipe = get_recipe(recipe)
    if rhs_gather is not None:
        rhs = gather(rhs, rhs_gather)
    lhs_axis, rhs_axis = _channel_axes(lhs, rhs, dimension_numbers)
    lhs_amax = _channel_amax(lhs, lhs_axis, recipe)
    rhs_amax = _channel_amax(rhs, rhs_axis, recipe)
    factors = _factors(lhs_amax, rhs_amax)
    known = {
        Role.LHS: jnp.max(lhs_amax * factors, initial=0.0),
        Role.RHS: jnp.max(rhs_amax / factors, initial=0.0),
    }
    return dot_general(
        _scaled(lhs, factors, lhs_axis),
        _scaled(rhs, 1 / factors, rhs_axis),
        dimension_numbers,
        *args,
        recipe=recipe,
        state=with_known_amax(state, known),
        **kwargs,
    )


def channel_factors(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The factors that `smooth_dot_general` finds for ``x @ kernel``, f32 [channels].

    Args:
      x: float [..., channels].
      kernel: float [channels, ...].
    """
    return _factors(_channel_amax(x, x.ndim - 1), _channel_amax(kernel, 0))


def fold_factors(up: jax.Array, down: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernels that have the factors in them: for inference, where they are fixed.

    ``down(activation(gate(x)) * up(x))`` is linear in the output of ``up``, so that scaling its
    columns scales the product. Exact, since factors are powers of two; scale a bias of ``up`` too.

    Args:
      up: kernel [features, channels] of the branch without activation.
      down: kernel [channels, features].
      factors: f32 [channels], from `channel_factors` on calibration data.

    Returns:
      ``up * factors`` and ``down / factors``.
    """
    return _scaled(up, factors, up.ndim - 1), _scaled(down, 1 / factors, 0)


def _channel_axes(lhs: jax.Array, rhs: jax.Array, dimension_numbers) -> tuple[int, int]:
    """The contracted axis of each operand."""
    (lhs_axes, rhs_axes), _ = dimension_numbers
    if len(lhs_axes) != 1 or lhs.shape[lhs_axes[0]] != rhs.shape[rhs_axes[0]]:
        raise UserError(
            f"smooth_dot_general: contracts axes {tuple(lhs_axes)} of {lhs.shape} with "
            f"{tuple(rhs_axes)} of {rhs.shape}; give one axis of channels, of equal size in both."
        )
    return lhs_axes[0], rhs_axes[0]


def _channel_amax(x: jax.Array, axis: int, recipe: Recipe | None = None) -> jax.Array:
    """The amax of each channel, f32 [channels]; with a recipe for all devices, if it says so."""
    others = tuple(other for other in range(x.ndim) if other != axis)
    amax = compute_amax(lax.stop_gradient(x), others).ravel()
    if recipe is None or recipe.amax_scope == "local":
        return amax
    axes = compat.reduction_axes((x,), ())
    return largest_amax(amax, axes) if axes else amax


def _factors(lhs_amax: jax.Array, rhs_amax: jax.Array) -> jax.Array:
    """``2**-k`` with ``k = floor(log2(lhs_amax / rhs_amax) / 2)``; 1 where an amax says nothing."""
    ratio = lhs_amax / rhs_amax
    known = (ratio > 0) & (ratio < jnp.inf)
    ratio = jnp.clip(jnp.where(known, ratio, 1.0), 1 / _LARGEST_RATIO, _LARGEST_RATIO)
    octaves = (lax.bitcast_convert_type(ratio, jnp.int32) >> 23) - 127
    return lax.bitcast_convert_type((127 - (octaves >> 1)) << 23, jnp.float32)


def _scaled(x: jax.Array, factors: jax.Array, axis: int) -> jax.Array:
    """``x * factors`` along an axis, in the type of `x`."""
    others = tuple(other for other in range(x.ndim) if other != axis)
    return x * jnp.expand_dims(factors, others).astype(x.dtype)
