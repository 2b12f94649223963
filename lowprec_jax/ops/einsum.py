"""Two-operand einsum as one quantized `dot_general` and one transpose."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowprec_jax.ops.dot_general import dot_general
from lowprec_jax.recipes import Recipe

_ELLIPSIS_LABELS = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ"


def einsum(
    subscripts: str,
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    recipe: Recipe | str,
    state: Mapping[str, Any] | None = None,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
    backend: str | None = None,
) -> jax.Array:
    """`jnp.einsum` of two operands, computed as a recipe says.

    Args:
      subscripts: ``"btd,df->btf"``; an ellipsis and an implicit output work as in NumPy. A label
        that occurs in one operand only and not in the output is summed before the product.
      lhs: first operand.
      rhs: second operand.
      recipe: see `dot_general`, as are the other arguments.
      state: scaling state of this call site.
      precision: for GEMMs in high precision.
      preferred_element_type: type of the result.
      out_sharding: sharding of the result on a mesh with explicit axes.
      backend: see `lowprec_jax.ops.backends.dot`.

    Raises:
      ValueError: not two operands, a label repeated within one, or labels that do not fit the
        shapes.
    """
    left, right, out = _parse(subscripts, lhs.ndim, rhs.ndim)
    lhs, left = _sum_unused(lhs, left, right + out)
    rhs, right = _sum_unused(rhs, right, left + out)
    _check_sizes(subscripts, left, lhs.shape, right, rhs.shape)
    batch = [label for label in left if label in right and label in out]
    contract = [label for label in left if label in right and label not in out]
    free = [label for label in left + right if (label in left) != (label in right)]
    result = batch + free
    order = [result.index(label) for label in out]
    product = dot_general(
        lhs,
        rhs,
        (
            ([left.index(c) for c in contract], [right.index(c) for c in contract]),
            ([left.index(b) for b in batch], [right.index(b) for b in batch]),
        ),
        precision,
        preferred_element_type,
        recipe=recipe,
        state=state,
        out_sharding=_unordered(out_sharding, order),
        backend=backend,
    )
    return product.transpose(order)


def _parse(subscripts: str, lhs_ndim: int, rhs_ndim: int) -> tuple[str, str, str]:
    text = subscripts.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(
            f"einsum: {subscripts!r} has {len(terms)} operands; two are supported. Split it into "
            "products of two."
        )
    left, right = (
        _expand(subscripts, term, n) for term, n in zip(terms, (lhs_ndim, rhs_ndim), strict=True)
    )
    dots = max((_dots(left), _dots(right)), key=len)
    if arrow:
        out = out.replace("...", dots)
    else:
        counts = collections.Counter(left + right)
        out = dots + "".join(sorted(c for c in counts if counts[c] == 1 and c not in dots))
    unknown = set(out) - set(left) - set(right)
    if unknown or len(set(out)) != len(out):
        raise ValueError(
            f"einsum: the output of {subscripts!r} repeats a label or has one that no operand has."
        )
    return left, right, out


def _expand(subscripts: str, term: str, ndim: int) -> str:
    """Labels of one operand, an ellipsis replaced by labels aligned to the right."""
    named = term.replace("...", "")
    extra = ndim - len(named)
    if "..." in term and extra >= 0:
        term = term.replace("...", _ELLIPSIS_LABELS[len(_ELLIPSIS_LABELS) - extra :])
    if len(term) != ndim:
        raise ValueError(
            f"einsum: {subscripts!r} names {len(named)} axes of an operand that has {ndim}."
        )
    if len(set(term)) != len(term):
        raise ValueError(
            f"einsum: {subscripts!r} repeats a label within one operand; take the diagonal first."
        )
    return term


def _dots(term: str) -> str:
    return "".join(label for label in term if label in _ELLIPSIS_LABELS)


def _sum_unused(x: jax.Array, labels: str, used: str) -> tuple[jax.Array, str]:
    axes = tuple(i for i, label in enumerate(labels) if label not in used)
    kept = "".join(label for label in labels if label in used)
    return (jnp.sum(x, axes), kept) if axes else (x, kept)


def _check_sizes(subscripts: str, left: str, lhs_shape, right: str, rhs_shape) -> None:
    sizes = dict(zip(left, lhs_shape, strict=True))
    for label, size in zip(right, rhs_shape, strict=True):
        if sizes.get(label, size) != size:
            raise ValueError(
                f"einsum: {subscripts!r}: axis {label!r} has size {sizes[label]} in lhs "
                f"{tuple(lhs_shape)} and {size} in rhs {tuple(rhs_shape)}."
            )


def _unordered(out_sharding, order: list[int]):
    """The sharding of the product before its axes are brought into `order`."""
    if out_sharding is None:
        return None
    spec = getattr(out_sharding, "spec", out_sharding)
    spec = [*spec, *[None] * (len(order) - len(spec))]
    by_axis = dict(zip(order, spec, strict=True))
    product = jax.sharding.PartitionSpec(*(by_axis[i] for i in range(len(order))))
    if isinstance(out_sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(out_sharding.mesh, product)
    return product
