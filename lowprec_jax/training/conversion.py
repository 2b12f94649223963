"""A state as one run has stored it, made into a state as another run, or phase, needs it.

What differs between recipes, history lengths and types of the parameters is converted; models and
optimizers must be the same. Works on flat mappings, see `lowprec_jax.training.state_leaves`.
Public names: `Conversion`, `plan_conversion`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowprec_jax.errors import UserError
from lowprec_jax.recipes import Column
from lowprec_jax.sharding import init_reduction
from lowprec_jax.training.state_leaves import Leaves, kind

__all__ = ["Conversion", "plan_conversion"]

_SITE = re.compile(r"scaling/(?P<site>.*)/(?P<field>amax_history|pending|observed|counter)")


class Conversion(NamedTuple):
    """How a state is made.

    Attributes:
      needs: what must be read, abstract and placed: stored path -> `jax.ShapeDtypeStruct`.
      make: from the arrays read to the leaves of the new state, by path.
      messages: what is converted, a sentence each; empty if nothing is.
      uncalibrated: some layers have no scales yet.
    """

    needs: dict[str, Any]
    make: Callable[[Leaves], dict[str, jax.Array]]
    messages: list[str]
    uncalibrated: bool


class _Source(NamedTuple):
    """The stored arrays that make a leaf, as abstract ones, and how."""

    needs: dict[str, Any]
    make: Callable[..., Any]


def plan_conversion(stored: Leaves, like: Leaves) -> Conversion:
    """How the state that `like` describes is made from one that is stored.

    - The scaling state of a layer that had none starts empty, to be calibrated; that of a layer
      that needs none is dropped. A history is cut, or goes on with the newest entries it has; from
      a recipe without one it starts with the last amax. The counter of stochastic rounding starts
      at 0.
    - Parameters of f32 become masters, and masters become parameters.
    - An average of the weights that was not kept starts from the weights.

    Args:
      stored: abstract arrays by path.
      like: abstract arrays with shardings by path.

    Raises:
      UserError: another model or optimizer; names the first array that differs.
    """
    sources = {name: _source(name, leaf, stored) for name, leaf in like.items()}
    needs = {k: v for source in sources.values() for k, v in source.needs.items()}

    def make(arrays: Leaves) -> dict[str, jax.Array]:
        made = {
            name: source.make(*(arrays[k] for k in source.needs))
            for name, source in sources.items()
        }
        return {
            name: x if x.sharding == like[name].sharding else jax.device_put(x, like[name].sharding)
            for name, x in made.items()
        }

    _require_all_used(stored, needs, like)
    uncalibrated = bool(_sites(like) - _sites(stored))
    return Conversion(needs, make, _messages(stored, like), uncalibrated)


def _source(name: str, leaf: Any, stored: Leaves) -> _Source:
    """Where a leaf comes from."""
    if name in stored and kind(stored[name]) == kind(leaf):
        return _Source({name: leaf}, lambda x: x)
    group, _, rest = name.partition("/")
    make = {
        "scaling": _scaling,
        "reduction": _reduction,
        "ema": _average,
        "params": _parameter,
        "opt_state": _optimizer,
    }.get(group)
    source = make(name, rest, leaf, stored) if make else None
    if source is None:
        there = kind(stored[name]) if name in stored else "missing"
        raise UserError(
            f"The checkpoint does not fit this run: {name} is {there} there and {kind(leaf)} here. "
            "Resume with the model and optimizer it was made with (see config.yaml beside it)."
        )
    return source


def _scaling(name: str, rest: str, leaf: Any, stored: Leaves) -> _Source | None:
    match = _SITE.fullmatch(name)
    assert match is not None, name
    site, field = f"scaling/{match['site']}", match["field"]
    observed = stored.get(f"{site}/observed")
    if observed is None or field == "counter":
        return _Source({}, lambda: jnp.zeros(leaf.shape, leaf.dtype))
    if field != "amax_history" or observed.shape[:-1] != leaf.shape[:-1]:
        return None  # layers stacked otherwise: another model
    window = leaf.shape[-1]
    if name in stored:
        needs = {name: _placed(stored[name], leaf)}
    else:
        needs = {f"{site}/observed": _placed(observed, leaf)}

    def make(x: jax.Array) -> jax.Array:
        if name not in stored:
            x = x[..., Column.AMAX : Column.AMAX + 1]
        known = x[..., :window]
        missing = window - known.shape[-1]
        return jnp.pad(known, (*((0, 0),) * (known.ndim - 1), (0, missing)))

    return _Source(needs, make)


def _reduction(name: str, rest: str, leaf: Any, stored: Leaves) -> _Source:
    return _Source({}, lambda: init_reduction([0] * leaf.shape[0])[rest])


def _average(name: str, rest: str, leaf: Any, stored: Leaves) -> _Source | None:
    return _from_f32(_f32_name(rest, stored), leaf, stored)


def _parameter(name: str, rest: str, leaf: Any, stored: Leaves) -> _Source | None:
    return _from_f32(_f32_name(rest, stored), leaf, stored)


def _optimizer(name: str, rest: str, leaf: Any, stored: Leaves) -> _Source | None:
    """Masters from parameters; the state of an optimizer with masters and of one without."""
    if rest.startswith("master/"):
        return _from_f32(f"params/{rest.removeprefix('master/')}", leaf, stored)
    other = rest.removeprefix("inner/") if rest.startswith("inner/") else f"inner/{rest}"
    other = f"opt_state/{other}"
    if other in stored and kind(stored[other]) == kind(leaf):
        return _Source({other: leaf}, lambda x: x)
    return None


def _f32_name(parameter: str, stored: Leaves) -> str:
    master = f"opt_state/master/{parameter}"
    return master if master in stored else f"params/{parameter}"


def _from_f32(source: str, leaf: Any, stored: Leaves) -> _Source | None:
    if source not in stored or stored[source].shape != leaf.shape:
        return None
    # A copy: another leaf may be the same array, and the step donates both.
    return _Source({source: _placed(stored[source], leaf)}, lambda x: jnp.array(x, leaf.dtype))


def _placed(stored: Any, leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=leaf.sharding)


def _require_all_used(stored: Leaves, needs: Leaves, like: Leaves) -> None:
    """What would be lost must be of a kind that may be."""
    masters = any(name.startswith("opt_state/master/") for name in (*stored, *like))
    for name in stored:
        replaceable = name.startswith(("scaling/", "reduction/", "ema/")) or (
            masters and name.startswith(("params/", "opt_state/master/"))
        )
        if name not in needs and not replaceable:
            raise UserError(
                f"The checkpoint does not fit this run: it has {name}, {kind(stored[name])}, which "
                "this run has not. Resume with the model and optimizer it was made with (see "
                "config.yaml beside it)."
            )


def _messages(stored: Leaves, like: Leaves) -> list[str]:
    """What is converted, for people."""
    was, now = _sites(stored), _sites(like)
    found = []
    if new := sorted(now - was):
        found.append(f"{_some(new)} had no scaling state: calibrated before the next step.")
    if gone := sorted(was - now):
        found.append(f"{_some(gone)} keep no scaling state any more: dropped.")
    histories = {
        f"{there.shape[-1] if there is not None else 0} to {leaf.shape[-1]}"
        for name, leaf in like.items()
        if name.endswith("/amax_history")
        and name.split("/amax_")[0] in {f"scaling/{s}" for s in was}
        and ((there := stored.get(name)) is None or there.shape != leaf.shape)
    }
    found += [f"Amax histories go from {change} steps." for change in sorted(histories)]
    types = {
        f"{stored[name].dtype} to {leaf.dtype}"
        for name, leaf in like.items()
        if name.startswith("params/") and name in stored and stored[name].dtype != leaf.dtype
    }
    found += [f"Parameters go from {change}, by way of f32 masters." for change in sorted(types)]
    if any(n.startswith("ema/") for n in like) and not any(n.startswith("ema/") for n in stored):
        found.append("The average of the weights starts from the weights.")
    return found


def _sites(leaves: Leaves) -> set[str]:
    return {match["site"] for match in map(_SITE.fullmatch, leaves) if match}


def _some(sites: list[str]) -> str:
    names = [site.removesuffix("/dot_general/scaling") for site in sites]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
