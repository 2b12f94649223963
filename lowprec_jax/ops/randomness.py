"""Random keys of stochastic rounding, so that nobody threads them through a model."""

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.numerics import compute_amax


def rounding_key(x: jax.Array, counter: jax.Array, seed: jax.Array | int) -> jax.Array:
    """The key for rounding `x`: the same for the same step, layer, device and data.

    Made of the step counter in the layer's state (so a run resumed from a checkpoint repeats it),
    the layer's seed (from its path), the index of the device along the manual mesh axes on which
    `x` differs (where the compiler splits arrays, random numbers are those of the whole array), and
    the bits of the amax of `x`: micro-batches, uses of a shared layer and layers of a scanned stack
    have the same counter and seed, but not the same data.

    Args:
      x: the tensor.
      counter: completed steps, f32 [].
      seed: what tells layers apart, an integer.
    """
    words = [counter.astype(jnp.uint32), jnp.asarray(seed).astype(jnp.uint32)]
    words += [lax.axis_index(axis) for axis in sorted(compat.varying_axes(x))]
    words.append(lax.bitcast_convert_type(compute_amax(x), jnp.uint32))
    key = jax.random.key(0)
    for word in words:
        key = jax.random.fold_in(key, word)
    return key
