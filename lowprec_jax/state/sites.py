"""Scaling state of a whole model: a tree whose leaves are call sites.

A site is the dict of `lowprec_jax.recipes.init_state`. The tree around it is the caller's: nested
dicts, lists, anything JAX knows. During one differentiated call the tree is *live*: every site
has a ``"sink"`` that its op writes to.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.ops.operands import largest_amax
from lowprec_jax.recipes import Column, advance_state, merge_observations

Tree = Any


def is_site(x: Any) -> bool:
    """Whether `x` is the state of one call site."""
    return isinstance(x, Mapping) and "pending" in x


def map_sites(f: Callable, tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` over the sites of a tree."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_site)


def sites(tree: Tree) -> list[tuple[str, Mapping[str, jax.Array]]]:
    """``(path, state)`` of every site, in tree order; paths are joined by ``/``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_site)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), site)
        for path, site in flat
        if is_site(site)
    ]


def make_sinks(tree: Tree, *, calibrating: bool = False) -> Tree:
    """Makes a live copy of scaling state, for one differentiated call.

    Inside `jax.shard_map` the sinks are local to each device; call this inside the region.

    Args:
      tree: scaling state.
      calibrating: leave the amax histories out, so that layers compute in high precision and only
        observe.

    Returns:
      The tree with a fresh ref under ``"sink"`` of every site.
    """

    def live(site):
        zeros = compat.to_varying(jnp.zeros_like(site["pending"]), compat.manual_axes())
        kept = {k: v for k, v in site.items() if not (calibrating and k == "amax_history")}
        return {**kept, "sink": jax.new_ref(zeros)}

    return map_sites(live, tree)


def collect(tree: Tree, live: Tree) -> Tree:
    """Reads the sinks of a live tree into ``pending`` of the state it was made from.

    Inside `jax.shard_map` and `jax.pmap` the observations are reduced over the axes along which
    they vary: one `pmax` for the amaxes of the whole model, one `psum` for the counts.

    Args:
      tree: the state that was given to `make_sinks`.
      live: what it returned, after the call.

    Returns:
      State as `tree`, with ``pending = max(pending, seen)`` (counts are added).
    """
    seen = [site["sink"][...] for _, site in sites(live)]
    return add_observations(tree, seen)


def add_observations(tree: Tree, seen: list[jax.Array]) -> Tree:
    """Merges one observation f32[*stack, 3, 5] per site, in tree order, into ``pending``."""
    reduced = iter(reduce_observations(seen, [site["pending"] for _, site in sites(tree)]))
    return map_sites(
        lambda site: {**site, "pending": merge_observations(site["pending"], next(reduced))}, tree
    )


def advance(tree: Tree, when: jax.Array | bool = True) -> Tree:
    """Completes an optimizer step: every site pushes what it observed, once. See `advance_state`.

    Args:
      tree: scaling state.
      when: whether a step was completed; with `optax.MultiSteps` its ``has_updated(opt_state)``.
    """
    return map_sites(lambda site: advance_state(dict(site), when), tree)


def reduce_observations(seen: list[jax.Array], like: list[jax.Array]) -> list[jax.Array]:
    """Reduces each observation over the mesh axes along which it, but not its state, varies.

    Sites that are reduced over the same axes share the collectives; a site whose state is split
    over an axis (experts) is not reduced over it.
    """
    axes = [compat.reduction_axes([x], [y]) for x, y in zip(seen, like, strict=True)]
    reduced = dict(enumerate(seen))
    for shared in filter(None, dict.fromkeys(axes)):
        which = [i for i, own in enumerate(axes) if own == shared]
        reduced.update(zip(which, _reduce([seen[i] for i in which], shared), strict=True))
    return [reduced[i] for i in range(len(seen))]


def _reduce(seen: list[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """One `pmax` for all amaxes and one `psum` for all counts."""
    rows = [x.reshape(-1, len(Column)) for x in seen]
    stacked = jnp.concatenate(rows)
    amax = largest_amax(stacked[:, Column.AMAX], axes)
    counts = lax.psum(stacked[:, Column.AMAX + 1 :], axes)
    reduced = jnp.concatenate([amax[:, None], counts], axis=1)
    ends = [0]
    for x in rows:
        ends.append(ends[-1] + x.shape[0])
    return [
        reduced[start:end].reshape(x.shape)
        for x, start, end in zip(seen, ends[:-1], ends[1:], strict=True)
    ]
