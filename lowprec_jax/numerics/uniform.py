"""Random numbers of stochastic rounding: one for every element, from its index."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Multipliers and shifts of "triple32", Chris Wellons' 32-bit integer hash (hash-prospector, public
# domain): of its kind the one with the least bias known, a bijection of 32 bits.
_MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
_SHIFTS = (17, 11, 15, 14)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform numbers in [0, 1), f32, whole multiples of 2**-24.

    A hash of the element's index and 64 random bits, computed where it is used and never stored.
    Each number depends on its index only, so that arrays split over devices have the numbers of the
    whole. Good enough to round with, and for nothing secret: `jax.random.uniform` has generators
    that were tested for more, and takes longer on CPUs than all other work of a rounding
    (`python -m benchmarks.cast`).

    Args:
      key: PRNG key.
      shape: shape of the result; beyond 2**32 elements numbers repeat.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = _hash(_hash(index ^ first) + second)
    return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _hash(x: jax.Array) -> jax.Array:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        x = (x ^ (x >> shift)) * np.uint32(multiplier)
    return x ^ (x >> _SHIFTS[-1])
