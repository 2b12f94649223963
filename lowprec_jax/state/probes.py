"""Probes: observations as gradients, for losses that contain what refuses refs.

JAX lets no ref into a `jax.shard_map` or an unmapped `jax.vmap` inside a differentiated function.
There a site's sink is a `Probe`: zeros that are differentiated along with the parameters, and whose
"gradient" is what the site observed. Symmetrical to `make_sinks` and `collect`::

    probes = make_probes(tree, copies=devices)

    def loss(params, probes, x):
        def region(params, probes, x):
            live = attach_probes(tree, probes)
            ...
        return jax.shard_map(region, in_specs=(P(), P("axis"), P("axis")), ...)(params, probes, x)

    grads, seen = jax.grad(loss, argnums=(0, 1))(params, probes, x)
    tree = advance(collect_probes(tree, seen))

A gradient adds up where a ref takes the maximum, so that a probe serves *one* call of one call
site: module reuse, hops of a ring and micro-batches need a copy each. `collect_probes` checks it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lowprec_jax.errors import UserError
from lowprec_jax.ops import Probe
from lowprec_jax.recipes import Column
from lowprec_jax.state.sites import Tree, add_observations, map_sites, sites


def make_probes(tree: Tree, copies: int | Sequence[int] = ()) -> Tree:
    """Probes for one differentiated call.

    Args:
      tree: scaling state.
      copies: leading axes: one entry per device (``P(axis)``), hop (`lax.scan`) or other call of
        the same site.

    Returns:
      `tree` with a `Probe` of f32[*copies, *stack, 3, 5] in the place of every site.
    """
    leading = (copies,) if isinstance(copies, int) else tuple(copies)

    def probe(site):
        shape = (*leading, *site["pending"].shape)
        return Probe(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:-2], jnp.float32))

    return map_sites(probe, tree)


def attach_probes(tree: Tree, probes: Tree, *, calibrating: bool = False) -> Tree:
    """A live copy of scaling state that observes into probes.

    Args:
      tree: scaling state.
      probes: from `make_probes`: one copy, or a part of the copies that holds one (what a device
        sees inside `jax.shard_map`).
      calibrating: see `make_sinks`.

    Raises:
      UserError: (from a probe with several copies) which one is meant is not known.
    """

    def live(site, probe):
        kept = {k: v for k, v in site.items() if not (calibrating and k == "amax_history")}
        return {**kept, "sink": one_copy(probe, site["pending"].ndim)}

    return map_sites(live, tree, probes)


def one_copy(probe: Probe, ndim: int) -> Probe:
    """The probe without its leading axes, which must have size 1; `ndim` is what remains."""
    shape = probe.value.shape
    leading = shape[: len(shape) - ndim]
    if any(n != 1 for n in leading):
        raise UserError(
            f"attach_probes: probes with copies {leading} where one is meant. Inside shard_map, "
            "pass them with in_specs P(axis), one copy per device; inside vmap or scan, with "
            "in_axes 0 or as xs; for calls of your own, index them: "
            "jax.tree.map(lambda x: x[i], probes)."
        )
    axes = tuple(range(len(leading)))
    uses = None if probe.uses is None else probe.uses.squeeze(axes)
    return Probe(probe.value.squeeze(axes), uses)


def collect_probes(tree: Tree, seen: Tree) -> Tree:
    """Merges the gradients of probes into ``pending``: the largest amax, the sum of the counts.

    Args:
      tree: scaling state.
      seen: gradients of the probes, of the structure that `make_probes` gave.

    Returns:
      State as `tree`. An operand that is replicated over copies is counted once for each.

    Raises:
      UserError: one copy was used more than once, so that its amax is a sum. Under `jit`, where
        values are not known, such an amax becomes NaN instead: `advance` drops and counts it.
    """
    names = [path for path, _ in sites(tree)]
    pendings = [site["pending"] for _, site in sites(tree)]
    probes = jax.tree.leaves(seen, is_leaf=lambda x: isinstance(x, Probe))
    merged = [
        _merged(name, probe, pending.ndim)
        for name, probe, pending in zip(names, probes, pendings, strict=True)
    ]
    return add_observations(tree, merged)


def merge_copies(seen: jax.Array, ndim: int) -> jax.Array:
    """Merges observations f32[*copies, ..., 5] over leading axes until `ndim` axes remain."""
    axes = tuple(range(seen.ndim - ndim))
    is_amax = jnp.arange(len(Column)) == Column.AMAX
    return jnp.where(is_amax, seen.max(axes), seen.sum(axes))


def _merged(name: str, probe: Probe, ndim: int) -> jax.Array:
    seen = probe.value
    if probe.uses is not None:
        again = probe.uses > 1
        if not isinstance(again, Tracer) and again.any():
            raise UserError(
                f"The probe of {name!r} was used {int(probe.uses.max())} times; a probe adds up, "
                "and the sum of amaxes is no amax. Give every use a copy of its own: "
                "make_probes(tree, copies=uses), and index them."
            )
        is_amax = jnp.arange(len(Column)) == Column.AMAX
        seen = jnp.where(again[..., None, None] & is_amax, jnp.nan, seen)
    return merge_copies(seen, ndim)
