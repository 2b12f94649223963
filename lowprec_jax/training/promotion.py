"""Layers that train in high precision for a while after a rollback. Imports no JAX.

Public names: `Promotion`, `suspects`, `layer_of`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from lowprec_jax.errors import UserError

__all__ = ["Promotion", "layer_of", "suspects"]

# Longest promotion, in units of the first.
LONGEST = 8

# An operand of a report: amax, scale, saturated, underflow, non-finite count, age of the scale.
Row = Sequence[float | None]


class _Stay(NamedTuple):
    """A promotion: until how many completed steps, and for how many."""

    until: int
    length: int


class Promotion:
    """Which layers are in high precision until when.

    Hysteresis: a layer that is promoted again before its promotion ended, or within `steps` steps
    after, stays twice as long as the last time, up to `LONGEST` times `steps`. One that went well
    for longer starts again.

    It goes on through a rollback: what was learned about layers is not restored with the
    checkpoint. A promotion that ends after step u is in force at all steps before u, so that going
    back to an earlier one does not end it.

    Args:
      steps: steps of a first promotion; 0: no layer is ever promoted.
    """

    def __init__(self, steps: int):
        self._steps = steps
        self._stays: dict[str, _Stay] = {}

    def promote(self, paths: Iterable[str], completed: int) -> dict[str, int]:
        """Promotes layers.

        Args:
          paths: of layers, such as "blocks/mlp/down"; see `suspects`.
          completed: completed steps, those of the checkpoint that the run went back to.

        Returns:
          For each path the completed steps after which it is demoted.
        """
        if self._steps == 0:
            return {}
        promoted = list(dict.fromkeys(paths))
        for path in promoted:
            until, length = completed + self._steps, self._steps
            last = self._stays.get(path)
            if last is not None and completed < last.until + self._steps:
                length = min(max(2 * last.length, self._steps), LONGEST * self._steps)
                until = max(completed + length, last.until)
            self._stays[path] = _Stay(until, length)
        return {path: self._stays[path].until for path in promoted}

    def paths(self, completed: int) -> frozenset[str]:
        """The layers in high precision in the step after `completed` ones."""
        return frozenset(path for path, stay in self._stays.items() if completed < stay.until)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        return {"layers": {path: list(stay) for path, stay in self._stays.items()}}

    @classmethod
    def restore(cls, steps: int, state: Mapping[str, Any]) -> Self:
        """Promotions that go on where `state` was taken; new ones last `steps`.

        Raises:
          UserError: `state` is not from `Promotion.state`.
        """
        promotion = cls(steps)
        try:
            promotion._stays = {
                str(path): _Stay(int(until), int(length))
                for path, (until, length) in state["layers"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"Promotions cannot be restored from {state!r} ({error!r}); give what "
                "Promotion.state returned, or start with Promotion(steps)."
            ) from error
        return promotion


def suspects(operands: Mapping[str, Row], *, saturated: float) -> list[str]:
    """The layers that low precision may have made a step fail in.

    The first of these that finds any: all layers with non-finite values; all with an operand that
    is clipped more than `saturated`; the one with the operand that loses most, clipped and rounded
    to zero together. A NaN spreads through the layers after it, and the order of the table is not
    that of execution, so the first kind may name many.

    Args:
      operands: the newest table of all operands before the rollback, in the form of
        `lowprec_jax.state.operand_table`, by names as in `layer_of`; a number that is not finite
        may be None.
      saturated: fraction of clipped elements above which an operand is suspect,
        `HealthConfig.saturated`.

    Returns:
      Paths of layers that have a quantized operand, sorted; none if no operand lost anything.
    """
    rows = [(layer_of(name), *(x or 0.0 for x in row)) for name, row in operands.items()]
    quantized = {layer for layer, _, scale, *_ in rows if scale > 0}
    rows = [row for row in rows if row[0] in quantized]
    broken = {layer for layer, _, _, _, _, nonfinite, _ in rows if nonfinite > 0}
    clipping = {layer for layer, _, _, clipped, *_ in rows if clipped > saturated}
    lost = [(clipped + underflow, layer) for layer, _, _, clipped, underflow, *_ in rows]
    most, worst = max(lost, default=(0.0, ""))
    return sorted(broken or clipping or ({worst} if most > 0 else ()))


def layer_of(operand: str) -> str:
    """``"blocks/mlp/down"`` of ``"blocks/mlp/down[2] output_grad"``: no stack index, no role."""
    return re.sub(r"\[\d+\]$", "", operand.rpartition(" ")[0])
