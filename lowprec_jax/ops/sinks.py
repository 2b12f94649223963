"""Sinks: where an op puts what it observed. The only thing ops know of scaling state's life.

A sink takes an observation f32[3, 5]: a row per `Role`, a column per `Column`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lowprec_jax import compat
from lowprec_jax.recipes import merge_observations


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ref", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class IndexedSink:
    """One row of a ref that holds the observations of many call sites.

    For transforms that cannot carry refs in their arguments: the ref is closed over, the index
    (an integer [], one per layer) travels as data.
    """

    ref: jax.Array
    index: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "uses"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probe:
    """A sink for places that refuse refs: zeros whose *gradient* is the observation.

    A probe adds up where a ref takes the maximum, so each serves one call site, once.
    `lowprec_jax.state.make_probes` makes them and `collect_probes` checks that.

    Attributes:
      value: f32[3, 5]; f32[G, 3, 5] for a grouped matmul.
      uses: f32 [] or [G], whose gradient is how often the probe was used; None: not counted.
    """

    value: jax.Array
    uses: jax.Array | None = None


Sink = jax.Array | IndexedSink | Probe


def check_sink(sink: object) -> None:
    """Refuses an array where a ref or a probe is meant.

    Raises:
      TypeError: `sink` is an array. ``ref[i]`` on a stacked ref silently reads it: the op would
        observe into a copy, and delayed scaling would never learn.
    """
    if isinstance(sink, IndexedSink | Probe) or compat.is_ref(sink):
        return
    raise TypeError(
        f"A sink must be a ref, an IndexedSink or a Probe, not {jax.typeof(sink)}. `ref[i]` reads "
        "a ref: pass one ref per call site, IndexedSink(ref, i), or Probe(zeros) whose gradient is "
        "the observation."
    )


def write(sink: Sink, seen: jax.Array) -> Probe | None:
    """Merges an observation f32[3, 5] into a ref.

    Returns:
      The gradient of the sink: a probe's is the observation, a ref has none.

    Raises:
      ValueError: the op runs inside a `shard_map` in which the sink is not local to each device.
    """
    if isinstance(sink, Probe):
        return _gradient_of(sink, seen)
    ref, where = (sink.ref, sink.index) if isinstance(sink, IndexedSink) else (sink, ...)
    unknown = compat.varying_axes(seen) - compat.varying_axes(ref)
    if unknown:
        raise ValueError(
            f"A sink was made outside the shard_map over {sorted(unknown)} in which its layer "
            "runs. If the shard_map is around value_and_grad, make the sinks inside it "
            "(value_and_grad called there does it). If it is inside the differentiated loss, refs "
            "cannot enter: pass a Probe per device, lowprec_jax.state.make_probes(tree, copies="
            f"devices) with in_specs=P({_names(unknown)})."
        )
    seen = compat.to_varying(seen, compat.varying_axes(ref))
    ref[where] = merge_observations(ref[where], seen)
    return None


def _gradient_of(probe: Probe, seen: jax.Array) -> Probe:
    axes = compat.varying_axes(probe.value)
    unknown = compat.varying_axes(seen) - axes
    if unknown:
        raise ValueError(
            f"A probe entered the shard_map over {sorted(unknown)} as one copy for all devices, "
            "whose amaxes would be added up. Give every device its own: lowprec_jax.state."
            f"make_probes(tree, copies=devices) with in_specs=P({_names(unknown)})."
        )
    uses = probe.uses
    if uses is not None:
        uses = compat.to_varying(jnp.ones(uses.shape, jnp.float32), axes)
    return Probe(compat.to_varying(seen, axes), uses)


def _names(axes: frozenset[str]) -> str:
    """Mesh axes as the first entry of a `PartitionSpec`."""
    names = sorted(axes)
    return repr(names[0] if len(names) == 1 else tuple(names))
