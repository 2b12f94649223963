"""Sum of gradients over devices with one byte per element on the wire, after FP8-LM.

Peng et al. 2023, arXiv:2310.18313, section 2.1. Every leaf has a pre-scale ``mu`` and, from one
``pmax`` of the amaxes of all leaves, a scale that all devices share: ``x ≈ code * scale`` with
``scale = amax / (mu * 448)``. Because the scale is shared, codes of different devices add up as
they are.

The sum is a ring's: each device gets one slice of every leaf from all others (``all_to_all``), adds
it up, and sends the result to all (``all_gather``): 2 (n-1)/n bytes per element and device, against
8 (n-1)/n of an f32 all-reduce. Codes travel as ``uint8``: XLA:CPU would move f8 as f16. All leaves
are in one ``all_to_all`` and one ``all_gather``; the latter also carries, in 8 bytes per leaf, the
scales of each slice and what the controller counts, so that the ``pmax`` is the only all-reduce.

A slice of a leaf is a whole number of blocks. What is done once per leaf (a scale, an amax, a
count) is done for all blocks of all leaves at once: one kernel, not one for each leaf.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.numerics import (
    E4M3FN,
    cast,
    decode,
    reciprocal,
    scale_from_amax,
    usable,
)
from lowprec_jax.numerics.scaling import magnitude_bits

Tree = Any
ReductionState = dict[str, jax.Array]
# Of what a device has of all leaves: codes (or values), scales, numbers of values at the maximum.
Slices = tuple[jax.Array, jax.Array, jax.Array]

# Elements. Padding costs less than this many bytes for each leaf and slice.
BLOCK = 128

# The controller of FP8-LM.
SATURATED_FRACTION = 1e-5
GROWTH = np.float32(2.0 ** (1 / 1000))
MAX_MU = 1.0


def init_reduction(grads: Tree) -> ReductionState:
    """State of `fp8_all_reduce`, replicated on all devices.

    Args:
      grads: gradients, or anything with as many leaves.

    Returns:
      ``{"mu": f32[leaves], "saturated": f32[leaves]}`` in the order of ``jax.tree.leaves``: the
      pre-scales, and the fraction of values at the FP8 maximum that was seen last.
    """
    leaves = len(jax.tree.leaves(grads))
    return {
        "mu": jnp.full(leaves, MAX_MU, jnp.float32),
        "saturated": jnp.zeros(leaves, jnp.float32),
    }


def next_mu(mu: jax.Array, saturated: jax.Array) -> jax.Array:
    """The pre-scale of the next step.

    Halved if more than 0.001 % of the values are at the FP8 maximum; else it grows by 2**(1/1000),
    so that it doubles in 1000 steps, up to 1. Sums in f32 do not overflow: there `mu` stays between
    0.48 and 1, which costs at most one of the 18 binades of e4m3.

    Args:
      mu: pre-scales, f32.
      saturated: fractions of values at the maximum, of the shape of `mu`.

    Differs from: FP8-LM, which names no upper limit. At 1 the largest gradient of all devices is
      the largest code. Beyond, it is clipped, and a leaf of which less than 0.001 % is not zero
      (rows of a large embedding) would be clipped a little more each step, for ever.
    """
    grown = jnp.minimum(mu * GROWTH, jnp.float32(MAX_MU))
    return jnp.where(saturated > SATURATED_FRACTION, mu / 2, grown)


def fp8_all_reduce(
    grads: Tree,
    state: ReductionState,
    axis_names: str | tuple[str, ...],
    *,
    accumulate: Literal["f32", "fp8"] = "f32",
) -> tuple[Tree, ReductionState]:
    """Sums gradients over mesh axes, with FP8 codes on the wire.

    For use inside `jax.shard_map` in place of ``lax.psum(grads, axis_names)``.

    Args:
      grads: tree of float arrays, local to each device: differentiate with respect to
        `local_copy` of the parameters, else JAX has summed them already.
      state: from `init_reduction` or the last call, equal on all devices.
      axis_names: mesh axes to sum over.
      accumulate: "f32" adds up codes in f32 and quantizes the sum once more, with scales of its
        own (one per leaf and slice). "fp8" is the paper's: rounded and saturated to FP8 after
        every addition, where `mu` keeps the sums from overflowing.

    Returns:
      ``(sums, state)``: f32 sums in the tree and shapes of `grads`, invariant over `axis_names` and
      bit for bit equal on all devices, and the state of the next step. A leaf with an Inf or NaN on
      any device is NaN everywhere, so that a guard sees it, and keeps its `mu`. Zeros give zeros
      and keep it too.

    Raises:
      TypeError: a leaf is not of a float type.
      ValueError: `accumulate` is unknown, or `state` is of another number of leaves.

    Differs from: MS-AMP's released code, where instead of `mu` stands a fixed 1/sqrt(n).
    """
    leaves, treedef = jax.tree.flatten(grads)
    _check(leaves, state, accumulate)
    if not leaves:
        return grads, state
    axes = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    devices = lax.axis_size(axes)
    # Blocks of each leaf that one device adds up, at least one; the leaf of every such block.
    blocks = [max(-(-x.size // (devices * BLOCK)), 1) for x in leaves]
    leaf = np.repeat(np.arange(len(leaves), dtype=np.int32), blocks)

    rows = jnp.concatenate([_rows(*x, devices) for x in zip(leaves, blocks, strict=True)], axis=1)
    amax = lax.pmax(_amax(rows, leaf), axes) / state["mu"]
    scale = _scale(amax)
    # The barrier keeps XLA:CPU from doing all of this once for each device it sends to.
    message = lax.optimization_barrier(_bytes(_quantize(rows, scale, leaf)))
    received = _values(lax.all_to_all(message, axes, 0, 0, tiled=True))
    add = _add_in_f32 if accumulate == "f32" else _add_in_fp8
    values, scales, at_max = _gather(*add(received, scale, leaf), axes)
    values = values * scales[:, leaf, None]

    split = jnp.split(values, np.cumsum(blocks)[:-1], axis=1)
    sums = [y.reshape(-1)[: x.size].reshape(x.shape) for x, y in zip(leaves, split, strict=True)]
    counted = [max(x.size, 1) * (devices if accumulate == "f32" else 1) for x in leaves]
    saturated = at_max.sum(axis=0) / np.array(counted, np.float32)
    mu = jnp.where(usable(amax), next_mu(state["mu"], saturated), state["mu"])
    return treedef.unflatten(sums), {"mu": mu, "saturated": saturated}


def _check(leaves: list[jax.Array], state: ReductionState, accumulate: str) -> None:
    if accumulate not in ("f32", "fp8"):
        raise ValueError(f"fp8_all_reduce: accumulate={accumulate!r}; choose 'f32' or 'fp8'.")
    wrong = sorted({str(x.dtype) for x in leaves if not jnp.issubdtype(x.dtype, jnp.floating)})
    if wrong:
        raise TypeError(
            f"fp8_all_reduce: leaves of type {', '.join(wrong)}; gradients must be float. Sum "
            "counters with jax.lax.psum."
        )
    if state["mu"].shape != (len(leaves),):
        raise ValueError(
            f"fp8_all_reduce: the state is of {state['mu'].size} leaves, grads has {len(leaves)}. "
            "Make it with init_reduction(grads)."
        )


def _rows(x: jax.Array, blocks: int, devices: int) -> jax.Array:
    """A leaf as f32[devices, blocks, BLOCK], padded with zeros."""
    flat = x.astype(jnp.float32).reshape(-1)
    flat = jnp.pad(flat, (0, devices * blocks * BLOCK - flat.size))
    return flat.reshape(devices, blocks, BLOCK)


def _amax(x: jax.Array, leaf: np.ndarray) -> jax.Array:
    """f32[leaves] of f32[..., blocks, BLOCK]: Inf for NaN too, which `pmax` may lose."""
    bits = magnitude_bits(x).reshape(-1, leaf.size, BLOCK).max(axis=(0, 2))
    amax = lax.bitcast_convert_type(_per_leaf(jax.ops.segment_max, bits, leaf), jnp.float32)
    return jnp.where(jnp.isfinite(amax), amax, jnp.inf)


def _scale(amax: jax.Array) -> jax.Array:
    """NaN for an amax that is not finite: the cast would saturate what must not look finite."""
    return jnp.where(jnp.isfinite(amax), scale_from_amax(amax, E4M3FN), jnp.nan)


def _quantize(x: jax.Array, scale: jax.Array, leaf: np.ndarray) -> jax.Array:
    """FP8 codes of f32[..., blocks, BLOCK] with a scale per leaf."""
    return cast(x * reciprocal(scale)[leaf, None], E4M3FN)


def _bytes(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint8)


def _values(codes: jax.Array) -> jax.Array:
    return decode(lax.bitcast_convert_type(codes, E4M3FN.dtype), E4M3FN)


def _is_max(values: jax.Array) -> jax.Array:
    return (jnp.abs(values) == E4M3FN.max).astype(jnp.float32)


def _count(flags: jax.Array, leaf: np.ndarray) -> jax.Array:
    """Sum of the flags f32[blocks, BLOCK] of each leaf, f32[leaves]."""
    return _per_leaf(jax.ops.segment_sum, flags.sum(axis=1), leaf)


def _per_leaf(combine: Callable, x: jax.Array, leaf: np.ndarray) -> jax.Array:
    """Combines [blocks] to [leaves]."""
    return combine(x, leaf, num_segments=int(leaf[-1]) + 1, indices_are_sorted=True)


def _add_in_f32(values: jax.Array, scale: jax.Array, leaf: np.ndarray) -> Slices:
    """Sums values of codes f32[devices, blocks, BLOCK]; the scales are new, from the sums.

    Values of codes are multiples of 2**-9 up to 448: their sum is exact for up to 64 devices.
    """
    total = values.sum(axis=0) * scale[leaf, None]
    total, at_max = lax.optimization_barrier((total, _is_max(values).sum(axis=0)))
    new = _scale(_amax(total, leaf))
    return _bytes(_quantize(total, new, leaf)), new, _count(at_max, leaf)


def _add_in_fp8(values: jax.Array, scale: jax.Array, leaf: np.ndarray) -> Slices:
    """As `_add_in_f32`, rounding after every addition; counts sums that ever were at the maximum.

    What the FP8 reduce-scatter of a ring computes, except that a ring starts every slice at another
    device and here all start at the first.
    """

    def add(carry, value):
        total, at_max = carry
        total = decode(cast(total + value, E4M3FN), E4M3FN)
        return (total, jnp.maximum(at_max, _is_max(total))), None

    (total, at_max), _ = lax.scan(add, (values[0], _is_max(values[0])), values[1:])
    return _bytes(cast(total, E4M3FN)), scale, _count(at_max, leaf)


def _gather(codes: jax.Array, scales: jax.Array, at_max: jax.Array, axes) -> Slices:
    """Gives the slices of all devices to all: [devices, blocks, BLOCK], the rest [devices, leaves].

    One u8 message: the f32 numbers travel as their bytes behind the codes.
    """
    numbers = jnp.stack([scales, at_max])
    message = jnp.concatenate([codes.reshape(-1), _bytes(numbers).reshape(-1)])
    message = lax.optimization_barrier(message)
    gathered = lax.optimization_barrier(lax.all_gather(message, axes, to="invarying"))
    head, tail = jnp.split(gathered, [codes.size], axis=1)
    numbers = lax.bitcast_convert_type(tail.reshape(-1, *numbers.shape, 4), jnp.float32)
    return _values(head.reshape(-1, *codes.shape)), numbers[:, 0], numbers[:, 1]
