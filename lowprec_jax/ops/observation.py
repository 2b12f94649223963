"""What is observed of the operands of a GEMM, on its way to a sink."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import lax

from lowprec_jax.numerics import (
    ScaledArray,
    compute_amax,
    range_row,
    reciprocal,
    spread,
)
from lowprec_jax.ops.operands import Forms, Known, Scales
from lowprec_jax.recipes import Recipe, Role


def observe(
    operands: Mapping[Role, tuple[jax.Array, Forms]], recipe: Recipe, known: Known
) -> jax.Array:
    """Some operands in their forms, f32[n, 4]: the `RangeStatistics` of each, in order."""
    rows = [_row(x, role, forms, recipe, known) for role, (x, forms) in operands.items()]
    return lax.concatenate(rows, 0) if len(rows) > 1 else rows[0]


def observation_of(rows: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """An observation f32[3, 5] of the rows of `observe`, of the first roles, and their sizes."""
    elements = np.array(sizes, np.float32)[:, None]
    seen, missing = lax.concatenate((rows, elements), 1), len(Role) - len(sizes)
    return lax.pad(seen, np.float32(0), ((0, missing, 0), (0, 0, 0))) if missing else seen


def _row(x: jax.Array, role: Role, forms: Forms, recipe: Recipe, known: Known) -> jax.Array:
    """f32[1, 4]; only the amax in high precision."""
    index = next(
        (i for i, q in enumerate(recipe.quantizers_of(role)) if q and not q.hadamard), None
    )
    if index is None:
        amax = lax.reshape(compute_amax(x), (1, 1))
        return lax.concatenate((amax, np.zeros((1, 3), np.float32)), 1)
    form = forms[index]
    assert isinstance(form, ScaledArray)
    if isinstance(known, Scales):
        factor = known.factor_of(role, index)
    else:
        scale = spread(form.scale, x.shape, form.tile)
        factor = reciprocal(scale if form.global_scale is None else scale * form.global_scale)
    return range_row(x, factor, form.format)
