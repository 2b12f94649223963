"""Fingerprints of arrays: the same number for the same bits, on a mesh and on the host.

A checkpoint is read back and compared with what was on the devices when it was saved, and what is
restored is compared with that again, on whatever mesh it is. The digests of files say which file is
damaged; these say that the values are right. Public names: `fingerprint`, `fingerprints`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["fingerprint", "fingerprints"]

# Multipliers of the finalizer of MurmurHash3; an odd one, the golden ratio, for the positions.
_MIX, _MIX_AGAIN, _POSITION = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9


@jax.jit
def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A number, uint32 [], for each array; sums of integers do not depend on how it is split."""
    return {name: _fingerprint(x, jax.lax.bitcast_convert_type, jnp) for name, x in arrays.items()}


def fingerprint(array: np.ndarray) -> int:
    """The same number of an array of the host."""
    return int(_fingerprint(np.atleast_1d(array), lambda x, dtype: x.view(dtype), np))


def _fingerprint(x: Any, bitcast: Any, xp: Any) -> Any:
    """The sum over all elements of a hash of the bits and the position, modulo 2**32."""
    if x.dtype == np.bool_:
        x = x.astype(np.uint8)
    bits = bitcast(x, f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    position = xp.zeros((), np.uint32)
    for axis, size in enumerate(x.shape):
        along = xp.arange(size, dtype=np.uint32).reshape(-1, *(1,) * (x.ndim - axis - 1))
        position = position * np.uint32(size % 2**32) + along
    mixed = bits ^ (position * np.uint32(_POSITION))
    for shift, factor in ((16, _MIX), (13, _MIX_AGAIN)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return (mixed ^ (mixed >> np.uint32(16))).sum(dtype=np.uint32)
