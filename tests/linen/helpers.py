"""What the Linen tests read from variables."""

import jax.numpy as jnp

from lowprec_jax.linen import OVERWRITE_WITH_GRADIENT
from lowprec_jax.recipes import Column
from lowprec_jax.state import sites


def scaling_of(variables):
    """State of each call site by the path of its layer, the op's own name left out."""
    found = sites(variables[OVERWRITE_WITH_GRADIENT])
    own = ("DotGeneral_0", "scaling")
    return {"/".join(p for p in path.split("/") if p not in own): site for path, site in found}


def newest_amax(variables):
    """The amaxes [..., 3] pushed last, by layer."""
    return {path: site["amax_history"][..., 0] for path, site in scaling_of(variables).items()}


def pending_amax(variables):
    """The amaxes [..., 3] observed since the last advance, by layer."""
    return {path: s["pending"][..., Column.AMAX] for path, s in scaling_of(variables).items()}


def sum_of_squares(model):
    """A loss of the variables and the inputs of a model."""

    def loss(variables, *inputs):
        return jnp.square(model.apply(variables, *inputs)).sum()

    return loss
