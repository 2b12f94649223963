"""What the observations say: saturation, underflow, non-finite values, age of the scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowprec_jax.recipes import Column, Role
from lowprec_jax.state.sites import Tree, sites


class Health(NamedTuple):
    """Health of the last completed step over all call sites and operands.

    Attributes:
      saturated: fraction of elements that the cast clipped.
      underflow: fraction of elements, not zero, that rounded to zero.
      nonfinite: number of NaN and infinite elements.
      scale_age: steps since the scale moved, the largest of any operand that was observed.
      worst: the operand with the largest saturated + underflow fraction; a name in the result of
        `health`, an index into `operand_names` in that of `summarize`.
    """

    saturated: float | jax.Array
    underflow: float | jax.Array
    nonfinite: float | jax.Array
    scale_age: float | jax.Array
    worst: str | jax.Array


def summarize(tree: Tree) -> Health | None:
    """Health as f32 scalars on the device, for use inside a compiled step; None without sites."""
    found = [site for _, site in sites(tree)]
    if not found:
        return None
    observed = jnp.concatenate([s["observed"].reshape(-1, len(Column)) for s in found])
    age = jnp.concatenate([s["age"].reshape(-1) for s in found])
    size = jnp.maximum(observed[:, Column.SIZE], 1)
    lost = (observed[:, Column.SATURATED] + observed[:, Column.UNDERFLOW]) / size
    total = observed.sum(0)
    elements = jnp.maximum(total[Column.SIZE], 1)
    return Health(
        saturated=total[Column.SATURATED] / elements,
        underflow=total[Column.UNDERFLOW] / elements,
        nonfinite=total[Column.NONFINITE],
        scale_age=age.max(),
        worst=lost.argmax(),
    )


def operand_names(tree: Tree) -> list[str]:
    """Names such as ``"blocks/mlp/down[2] output_grad"``, in the order of `summarize`."""
    names = []
    for path, site in sites(tree):
        layers = site["age"].size // len(Role)
        where = [path] if layers == 1 else [f"{path}[{layer}]" for layer in range(layers)]
        names += [f"{place} {role.name.lower()}" for place in where for role in Role]
    return names


def health(tree: Tree) -> Health:
    """Health of a model's scaling state as numbers; waits for the device.

    Args:
      tree: scaling state after `advance`.
    """
    summary = summarize(tree)
    if summary is None:
        return Health(0.0, 0.0, 0.0, 0.0, "")
    host = jax.device_get(summary)
    return Health(
        float(host.saturated),
        float(host.underflow),
        float(host.nonfinite),
        float(host.scale_age),
        operand_names(tree)[int(host.worst)],
    )
