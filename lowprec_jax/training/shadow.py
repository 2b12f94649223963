"""How much the recipe costs the gradients: their SQNR against a shadow in high precision.

On a sampled step the gradients of the same parameters and batch are computed twice, with the
recipes in force and without any. Nothing of the run is changed by it.

Public names: `Comparison`, `build_shadow`, `sqnr_record`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec_jax.training.network import Network
from lowprec_jax.training.step import Batch, build_gradients

Tree = Any


class Comparison(NamedTuple):
    """A step in low precision against the same one in high precision.

    Attributes:
      sqnr: signal to quantization noise of the gradient of every parameter, dB, f32 [], or
        f32 [layers] for the parameters of a scanned stack. Inf where both are equal, NaN where
        the reference is zero.
      loss_difference: loss in low precision minus that in high precision, nats, f32 [].
    """

    sqnr: Tree
    loss_difference: jax.Array


def build_shadow(
    network: Network, shadow: Network, *, micro_batches: int = 1
) -> Callable[[Tree, Tree, Batch], Comparison]:
    """The jitted comparison ``(params, scaling, batch) -> Comparison``; nothing is donated.

    Observations are dropped: scaling state is read and not advanced. The step donates its state, so
    call this before it, with the batch that the step will get.

    Args:
      network: the network of the run.
      shadow: the same network, laid out the same, with recipe "none".
      micro_batches: see `build_step`; those of the step bound the memory alike.
    """
    in_force = build_gradients(network, micro_batches)
    reference = build_gradients(shadow, micro_batches)

    def compare(params: Tree, scaling: Tree, batch: Batch) -> Comparison:
        loss, grads, _ = in_force(params, (scaling, {}), batch)
        # One after the other: half the memory, and no two collectives at a time.
        params, loss, grads = lax.optimization_barrier((params, loss, grads))
        expected_loss, expected, _ = reference(params, ({}, {}), batch)
        sqnr = jax.tree_util.tree_map_with_path(_sqnr_db, expected, grads)
        return Comparison(sqnr, loss - expected_loss)

    return network.layout.jit(compare)


def sqnr_record(sqnr: Tree) -> dict[str, float]:
    """``{"blocks/mlp/down/kernel[2]": 21.3, ...}``, dB; waits for the device.

    Args:
      sqnr: from `Comparison`.
    """
    record: dict[str, float] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(sqnr)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if np.ndim(value) == 0:
            record[name] = float(value)
        else:
            record |= {f"{name}[{layer}]": float(x) for layer, x in enumerate(value)}
    return record


def _sqnr_db(path: tuple[Any, ...], reference: jax.Array, approximation: jax.Array) -> jax.Array:
    """``10 log10(|ref|^2 / |ref - approx|^2)``, by layer for the parameters of a scanned stack.

    Sums over axes, not over a flattened array, which explicit shardings do not allow.
    """
    axes = tuple(range(1 if _is_stacked(path) else 0, reference.ndim))
    reference, approximation = reference.astype(jnp.float32), approximation.astype(jnp.float32)
    signal = jnp.square(reference).sum(axes)
    noise = jnp.square(reference - approximation).sum(axes)
    return 10 * jnp.log10(signal / noise)


def _is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether a parameter holds all layers: those not scanned have their index after "blocks"."""
    names = jax.tree_util.keystr(path[:2], simple=True, separator="/").split("/")
    return names[0] == "blocks" and not names[-1].isdigit()
