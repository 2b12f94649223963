"""What is observed of the operands of a GEMM, on its way to a sink."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics import (
    ScaledArray,
    compute_amax,
    range_counts,
    range_numbers,
    reciprocal,
    spread,
)
from lowprec_jax.numerics.scaling import magnitude_bits
from lowprec_jax.ops.operands import Forms, Known, Scales
from lowprec_jax.recipes import Column, Recipe, Role


def observe(
    operands: Mapping[Role, tuple[jax.Array, Forms]], recipe: Recipe, known: Known
) -> jax.Array:
    """`range_counts` int32[n, 4] of some operands, in their forms: a row for each, in order."""
    rows = [_row(x, role, forms, recipe, known) for role, (x, forms) in operands.items()]
    return lax.concatenate(rows, 0) if len(rows) > 1 else rows[0]


def amaxes_of(counts: jax.Array) -> jax.Array:
    """The amaxes among the rows of `observe`, of the first roles, as an observation f32[3, 5]."""
    bits = lax.slice_in_dim(counts, 0, 1, axis=1)
    return _padded(lax.bitcast_convert_type(bits, jnp.float32))


def observation_of(counts: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """An observation f32[3, 5] of the rows of `observe`, of the first roles, and their sizes."""
    elements = np.array(sizes, np.float32)[:, None]
    return _padded(lax.concatenate((range_numbers(counts), elements), 1))


def _padded(x: jax.Array) -> jax.Array:
    rows, columns = len(Role) - x.shape[0], len(Column) - x.shape[1]
    if not rows and not columns:
        return x
    return lax.pad(x, np.float32(0), ((0, rows, 0), (0, columns, 0)))


def _row(x: jax.Array, role: Role, forms: Forms, recipe: Recipe, known: Known) -> jax.Array:
    """int32[1, 4]; only the amax in high precision."""
    index = next(
        (i for i, q in enumerate(recipe.quantizers_of(role)) if q and not q.hadamard), None
    )
    if index is None:
        bits = lax.reshape(magnitude_bits(compute_amax(x)), (1, 1))
        return lax.concatenate((bits, np.zeros((1, 3), np.int32)), 1)
    form = forms[index]
    assert isinstance(form, ScaledArray)
    if isinstance(known, Scales):
        factor = known.reciprocal[role][index]
    else:
        scale = spread(form.scale, x.shape, form.tile)
        factor = reciprocal(scale if form.global_scale is None else scale * form.global_scale)
    return range_counts(x, factor, form.format)
