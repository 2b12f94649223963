"""Tiles: the parts of a tensor that share a scale, as views of it.

A tile has one size per axis. An axis of `n` elements under a tile of `t` has ``ceil(n / t)``
scales; the last tile is padded with zeros, which change no amax, and trimmed again.
"""

import math

import jax
import jax.numpy as jnp

Tile = tuple[int, ...]


def scale_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """Shape of the scales of a tensor: one for each tile."""
    return tuple(math.ceil(n / t) for n, t in zip(shape, tile, strict=True))


def split(x: jax.Array, tile: Tile) -> tuple[jax.Array, tuple[int, ...]]:
    """A view of `x` in which every axis is an axis of tiles and one of the elements within.

    Args:
      x: array.
      tile: elements per scale, by axis, 1 or more.

    Returns:
      The view, whose axis ``2 i`` has the tiles of axis ``i`` and ``2 i + 1`` the elements of one,
      and the axes to reduce over: the odd ones with more than one element.
    """
    tile = tuple(max(1, min(t, n)) for t, n in zip(tile, x.shape, strict=True))
    padding = [(0, -n % t) for n, t in zip(x.shape, tile, strict=True)]
    if any(after for _, after in padding):
        x = jnp.pad(x, padding)
    pairs = [(n // t, t) for n, t in zip(x.shape, tile, strict=True)]
    view = x.reshape([size for pair in pairs for size in pair])
    return view, tuple(2 * i + 1 for i, t in enumerate(tile) if t > 1)


def merge(view: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `split` for a tensor of this shape: padding is trimmed."""
    whole = view.reshape([a * b for a, b in zip(view.shape[::2], view.shape[1::2], strict=True)])
    return whole if whole.shape == shape else whole[tuple(slice(n) for n in shape)]


def spread(scale: jax.Array, shape: tuple[int, ...], tile: Tile) -> jax.Array:
    """Scales brought to a shape that broadcasts against the tensor.

    Args:
      scale: rank 0, or one entry per tile along each axis (or 1 for all of it).
      shape: shape of the tensor.
      tile: elements per scale, aligned to the last axes; read only for axes of several tiles.
    """
    for axis in range(scale.ndim):
        n, tiles = shape[axis - scale.ndim], scale.shape[axis]
        if tiles in (1, n):
            continue
        size = tile[axis - scale.ndim]
        scale = jnp.repeat(scale, size, axis=axis, total_repeat_length=tiles * size)
        scale = jax.lax.slice_in_dim(scale, 0, n, axis=axis)
    return scale
