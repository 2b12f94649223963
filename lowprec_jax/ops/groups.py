"""Arrays whose entries belong to groups: one amax, one scale and one set of counts for each group.

An entry is an index of the leading axis: a row of a token matrix, or a whole expert matrix.
"""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax.numerics import Format, compute_amax, range_statistics
from lowprec_jax.numerics.scaling import magnitude_bits


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which group each entry of an array belongs to.

    Attributes:
      ids: int32 [entries]; `count` or more for an entry of no group, which is left out everywhere.
      count: number of groups.
    """

    ids: jax.Array
    count: int

    @classmethod
    def of_rows(cls, sizes: jax.Array, rows: int) -> Self:
        """Rows sorted by group; those beyond the sum of `sizes` (int [groups]) are in none."""
        row = lax.broadcasted_iota(sizes.dtype, (rows, sizes.size), 0)
        return cls((row >= jnp.cumsum(sizes)).sum(-1, dtype=jnp.int32), sizes.size)

    @classmethod
    def one_each(cls, count: int) -> Self:
        """One entry for each group."""
        return cls(jnp.arange(count, dtype=jnp.int32), count)

    @property
    def used(self) -> jax.Array:
        """Whether an entry is in a group, bool [entries]."""
        return self.ids < self.count

    def spread(self, values: jax.Array, ndim: int) -> jax.Array:
        """The value of its group for each entry: [groups] to [entries, 1, ...] of rank `ndim`.

        Entries of no group get the value of some group.
        """
        each = values.at[self.ids].get(mode="clip")
        return each.reshape(-1, *(1,) * (ndim - 1))

    def amax(self, x: jax.Array) -> jax.Array:
        """Largest magnitude in each group, f32 [groups]: NaN if there is one, 0 if empty."""
        return self._max(jax.vmap(compute_amax)(x))

    def statistics(self, x: jax.Array, scale: jax.Array, fmt: Format) -> jax.Array:
        """`numerics.range_statistics` of each group.

        Args:
          x: float [entries, ...].
          scale: f32, broadcastable to `x`.
          fmt: the format it is quantized to.

        Returns:
          f32 [groups, 4]: amax, saturated, underflow, non-finite.
        """
        scale = jnp.broadcast_to(scale, (x.shape[0], *scale.shape[1:]))
        each = jax.vmap(lambda entry, scale: range_statistics(entry, scale, fmt))(x, scale)
        counts = self._sum(jnp.stack(each[1:], axis=-1).astype(jnp.int32))
        return jnp.concatenate([self._max(each.amax)[:, None], counts.astype(jnp.float32)], axis=-1)

    def elements(self, x: jax.Array) -> jax.Array:
        """Number of elements of `x` in each group, f32 [groups]."""
        entries = self._sum(jnp.ones(x.shape[0], jnp.int32))
        return entries.astype(jnp.float32) * math.prod(x.shape[1:])

    def _max(self, amax: jax.Array) -> jax.Array:
        """As integers: the float maximum of XLA:CPU loses NaN."""
        bits = jax.ops.segment_max(magnitude_bits(amax), self.ids, self.count)
        return lax.bitcast_convert_type(jnp.maximum(bits, 0), jnp.float32)

    def _sum(self, counts: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(counts, self.ids, self.count)
