"""Scaling state in a dict of Linen variables: create it, advance it, read its health."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from lowprec_jax import state
from lowprec_jax.linen.dot_general import OVERWRITE_WITH_GRADIENT

_LOG = logging.getLogger(__name__)

Variables = Mapping[str, Any]
Path = tuple[str, ...]
Site = Mapping[str, jax.Array]


def advance(variables: Variables, when: jax.Array | bool = True) -> Any:
    """Completes an optimizer step: every layer pushes what it observed, once.

    For loops that differentiate with ``value_and_grad(..., advance=False)``.

    Args:
      variables: variables of a model, as in ``TrainState.params``.
      when: whether a step was completed (bool or bool []); with `optax.MultiSteps` its
        ``has_updated(opt_state)``.

    Returns:
      Variables of the same structure.
    """
    if OVERWRITE_WITH_GRADIENT not in variables:
        return variables
    following = state.advance(variables[OVERWRITE_WITH_GRADIENT], when)
    joined = {**variables, OVERWRITE_WITH_GRADIENT: following}
    return jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(joined))


def health(variables: Variables) -> state.Health:
    """Saturation, underflow, non-finite values and scale age in the last completed step.

    Args:
      variables: variables of a model; reads from the device.
    """
    return state.health(variables.get(OVERWRITE_WITH_GRADIENT, {}))


def init_scaling(
    model: nn.Module, variables: Variables, *inputs: Any, **kwargs: Any
) -> dict[str, Any]:
    """Fits the scaling state of `variables` to `model`, and logs what it did.

    For variables of another run: parameters without state, another history length, other recipes.
    State that fits is kept; a longer history loses its oldest entries; a layer without state gets
    an empty one (`calibrate` fills it).

    Args:
      model: the model that the variables are for.
      variables: its variables.
      *inputs: what the model is called with; shapes suffice (`jax.ShapeDtypeStruct`).
      **kwargs: static arguments of the call.

    Returns:
      `variables` with state for exactly the layers of `model` that keep it.
    """
    shapes = jax.eval_shape(lambda *xs: model.init(jax.random.key(0), *xs, **kwargs), *inputs)
    wanted = _sites(shapes.get(OVERWRITE_WITH_GRADIENT, {}))
    known = _sites(variables.get(OVERWRITE_WITH_GRADIENT, {}))
    fitted = {path: _fit(site, known.get(path, {})) for path, site in wanted.items()}
    created, dropped = wanted.keys() - known.keys(), known.keys() - wanted.keys()
    resized = [
        path for path in wanted.keys() & known.keys() if not _same(wanted[path], known[path])
    ]
    for done, paths in (("created", created), ("dropped", dropped), ("resized", resized)):
        if paths:
            names = ", ".join(sorted("/".join(path[:-1]) for path in paths))
            _LOG.warning("init_scaling: %s the scaling state of %s", done, names)
    others = {key: value for key, value in variables.items() if key != OVERWRITE_WITH_GRADIENT}
    if not fitted:
        return others
    return {**others, OVERWRITE_WITH_GRADIENT: traverse_util.unflatten_dict(fitted)}


def _sites(collection: Variables) -> dict[Path, Site]:
    """The state of each call site by its path, which ends in the variable's name."""
    flat: Any = traverse_util.flatten_dict(collection, is_leaf=lambda _, x: state.is_site(x))
    return flat


def _same(wanted: Site, known: Site) -> bool:
    return {k: x.shape for k, x in wanted.items()} == {k: x.shape for k, x in known.items()}


def _fit(wanted: Site, known: Site) -> dict[str, Any]:
    """State of the shapes of `wanted` with what fits of `known`."""
    fitted = {}
    for name, like in wanted.items():
        old = known.get(name)
        if old is None or old.shape[:-1] != like.shape[:-1]:
            fitted[name] = jnp.zeros(like.shape, like.dtype)
            continue
        missing = max(like.shape[-1] - old.shape[-1], 0)
        padding = jnp.zeros((*like.shape[:-1], missing), like.dtype)
        fitted[name] = jnp.concatenate([old[..., : like.shape[-1]], padding], axis=-1)
    return fitted
