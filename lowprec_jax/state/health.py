"""What the observations say: saturation, underflow, non-finite values, age of the scales."""

from typing import NamedTuple

import jax
import numpy as np

from lowprec_jax.recipes import Column, Role
from lowprec_jax.state.sites import Tree, sites


class Health(NamedTuple):
    """Health of the last completed step over all sites and operands that were observed.

    Attributes:
      saturated: fraction of elements that the cast clipped.
      underflow: fraction of elements, not zero, that rounded to zero.
      nonfinite: number of NaN and infinite elements.
      scale_age: steps since the scale moved, the largest of any operand.
      worst: path and role of the operand with the largest saturated + underflow fraction.
    """

    saturated: float
    underflow: float
    nonfinite: float
    scale_age: float
    worst: str


def health(tree: Tree) -> Health:
    """Summarises the health of a model's scaling state; reads from the device.

    Args:
      tree: scaling state after `advance`.
    """
    rows = [row for path, site in sites(jax.device_get(tree)) for row in _rows(path, site)]
    if not rows:
        return Health(0.0, 0.0, 0.0, 0.0, "")
    names, observed, age = zip(*rows, strict=True)
    observed, age = np.stack(observed), np.array(age)
    size = np.maximum(observed[:, Column.SIZE], 1)
    lost = (observed[:, Column.SATURATED] + observed[:, Column.UNDERFLOW]) / size
    total = observed.sum(0)
    elements = max(total[Column.SIZE], 1)
    return Health(
        float(total[Column.SATURATED] / elements),
        float(total[Column.UNDERFLOW] / elements),
        float(total[Column.NONFINITE]),
        float(age.max()),
        names[int(lost.argmax())],
    )


def _rows(path: str, site):
    """(name, observation, age) of each operand of a site; one per layer of a stack."""
    observed = np.asarray(site["observed"]).reshape(-1, len(Role), len(Column))
    age = np.asarray(site["age"]).reshape(-1, len(Role))
    for layer in range(len(observed)):
        where = path if len(observed) == 1 else f"{path}[{layer}]"
        for role in Role:
            yield f"{where} {role.name.lower()}", observed[layer, role], age[layer, role]
