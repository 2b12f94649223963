"""Transposed codes, quickly on CPUs too."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax import compat

_ROWS = 16  # of a block: one SIMD register of bytes
_MIN_SIZE = 1 << 16  # below this the loop costs more than it saves


def transpose(codes: jax.Array, order: Sequence[int]) -> jax.Array:
    """`codes` with its axes in another order.

    XLA:CPU fuses a transpose with the cast in front of it into a loop that reads, converts and
    misses the cache element by element. There large arrays are moved in blocks of 16 rows of the
    axis that comes last, by a loop, into which nothing is fused: `python -m benchmarks.cast` says
    how much faster. Elsewhere it is `jax.lax.transpose`.

    f8 codes are moved as bytes: XLA:CPU updates no slices of f8 in place, and folds a transpose of
    f8 constants that are seen as bytes later into wrong numbers (0.10.2).

    Args:
      codes: array of any type; blocks are for those of a byte.
      order: the axes of the result.
    """
    order = tuple(order)
    dtype = codes.dtype
    if dtype.itemsize != 1:
        return codes.transpose(order)
    source = lax.bitcast_convert_type(codes, jnp.uint8) if _is_f8(dtype) else codes
    moved = _transpose_bytes(source, order=order)
    return lax.bitcast_convert_type(moved, dtype) if _is_f8(dtype) else moved


def _is_f8(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == 8


# Compiled by itself, so that the loop is traced and lowered once for arrays of equal shapes.
@functools.partial(jax.jit, static_argnames="order")
def _transpose_bytes(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    small = x.size < _MIN_SIZE or x.shape[order[-1]] < _ROWS
    if small or order[-1] == x.ndim - 1 or compat.explicit_shardings(x)[0] is not None:
        return x.transpose(order)
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_in_blocks, order=order),
        default=functools.partial(lax.transpose, permutation=order),
    )


def _in_blocks(x: jax.Array, *, order: tuple[int, ...]) -> jax.Array:
    axis, last = order[-1], x.ndim - 1
    size = x.shape[axis]
    origin = [np.int32(0)] * x.ndim

    def move(start, rows, out):
        shape = [*x.shape[:axis], rows, *x.shape[axis + 1 :]]
        source, target = ([*origin[:i], start, *origin[i + 1 :]] for i in (axis, last))
        block = lax.dynamic_slice(x, source, shape, allow_negative_indices=False)
        moved = lax.transpose(block, order)
        return lax.dynamic_update_slice(out, moved, target, allow_negative_indices=False)

    # Zeros made from `x`, so that no `lax.scan` hoists them; XLA sees that they are constant. All
    # are overwritten, but `x` itself in their place would be computed twice.
    zeros = lax.bitwise_and(x, np.zeros((), x.dtype))
    out = lax.reshape(zeros, [x.shape[i] for i in order])
    whole = np.int32(size - size % _ROWS)
    # No `lax.fori_loop`, which is a scan here: differentiated, it stacks what its steps start at.
    _, out = lax.while_loop(
        lambda carry: lax.lt(carry[0], whole),
        lambda carry: (lax.add(carry[0], np.int32(_ROWS)), move(carry[0], _ROWS, carry[1])),
        (jnp.int32(0), out),
    )
    return move(whole, size % _ROWS, out) if size % _ROWS else out
