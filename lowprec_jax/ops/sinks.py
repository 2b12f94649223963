"""Sinks: where an op puts what it observed. The only thing ops know of scaling state's life.

A sink takes an observation f32[3, 5]: a row per `Role`, a column per `Column`.
"""

import dataclasses
import functools

import jax

from lowprec_jax import compat
from lowprec_jax.recipes import merge_observations


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ref", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class IndexedSink:
    """One row of a ref that holds the observations of many call sites.

    For transforms that cannot carry refs in their arguments: the ref is closed over, the index
    (int32 [], one per layer) travels as data.
    """

    ref: jax.Array
    index: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probe:
    """A sink for places that refuse refs: zeros f32[3, 5] whose *gradient* is the observation.

    A probe adds up where a ref takes the maximum, so each serves one call site, once.
    """

    value: jax.Array


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
      ValueError: the ref was made outside the `shard_map` in which the op runs.
    """
    if isinstance(sink, Probe):
        return Probe(compat.to_varying(seen, compat.varying_axes(sink.value)))
    ref, where = (sink.ref, sink.index) if isinstance(sink, IndexedSink) else (sink, ...)
    unknown = compat.varying_axes(seen) - compat.varying_axes(ref)
    if unknown:
        raise ValueError(
            f"A sink was made outside the shard_map over {sorted(unknown)} in which its layer "
            "runs. Make sinks inside the region (value_and_grad called there does it), or use a "
            "Probe."
        )
    seen = compat.to_varying(seen, compat.varying_axes(ref))
    ref[where] = merge_observations(ref[where], seen)
    return None
