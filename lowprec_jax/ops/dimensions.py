"""Dimension numbers of the two backward GEMMs, derived from those of the forward one."""

import dataclasses
from collections.abc import Sequence
from typing import Self

DotDimensions = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Dimension numbers of ``fwd``, ``dgrad`` and ``wgrad``, and the axis orders between them.

    Attributes:
      forward: ``lhs x rhs``, as in `jax.lax.dot_general`.
      dgrad: ``output_grad x rhs``.
      dgrad_to_lhs: axis order that turns the result of `dgrad` into the layout of lhs.
      lhs_to_wgrad: axis order in which lhs is kept for `wgrad`: batch, contracted, free. The axes
        that `wgrad` sums over come last, so that it is a plain (row-major) matmul: XLA:CPU has no
        fast bf16 form with a transposed left operand.
      wgrad: ``kept lhs x output_grad``.
      wgrad_to_rhs: axis order that turns the result of `wgrad` into the layout of rhs.
      groups: by `Role`, the axes of the operand that its first GEMM contracts and its second leaves
        free, and those that the second contracts; the operand's own axis numbers.
    """

    forward: DotDimensions
    dgrad: DotDimensions
    dgrad_to_lhs: tuple[int, ...]
    lhs_to_wgrad: tuple[int, ...]
    wgrad: DotDimensions
    wgrad_to_rhs: tuple[int, ...]
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, lhs_ndim: int, rhs_ndim: int, dimension_numbers) -> Self:
        """Derives all from the ranks of the operands and the forward dimension numbers."""
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (
            tuple(tuple(int(i) % n for i in axes) for axes, n in zip(pair, ndims, strict=True))
            for pair, ndims in zip(dimension_numbers, ((lhs_ndim, rhs_ndim),) * 2, strict=True)
        )
        lhs_free = _others(lhs_ndim, lhs_contract + lhs_batch)
        rhs_free = _others(rhs_ndim, rhs_contract + rhs_batch)
        n_batch, n_lhs, n_rhs = len(lhs_batch), len(lhs_free), len(rhs_free)
        batch = tuple(range(n_batch))
        grad_lhs = tuple(range(n_batch, n_batch + n_lhs))
        grad_rhs = tuple(range(n_batch + n_lhs, n_batch + n_lhs + n_rhs))

        # dgrad leaves batch, lhs_free, and the contracted axes in the order they have in rhs.
        contracted = tuple(lhs_contract[i] for i in _order(rhs_contract))
        kept = lhs_batch + lhs_contract + lhs_free
        kept_free = tuple(range(n_batch + len(lhs_contract), lhs_ndim))
        return cls(
            forward=((lhs_contract, rhs_contract), (lhs_batch, rhs_batch)),
            dgrad=((grad_rhs, rhs_free), (batch, rhs_batch)),
            dgrad_to_lhs=_order(lhs_batch + lhs_free + contracted),
            lhs_to_wgrad=kept,
            wgrad=((kept_free, grad_lhs), (batch, batch)),
            wgrad_to_rhs=_order(rhs_batch + rhs_contract + rhs_free),
            groups=((lhs_contract, lhs_free), (rhs_contract, rhs_free), (grad_rhs, grad_lhs)),
        )


def _others(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in axes)


def _order(axes: Sequence[int]) -> tuple[int, ...]:
    """The order that sorts `axes`: the inverse permutation."""
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))
