"""`lax.cond` for branches that contain quantized layers.

JAX 0.10 cannot differentiate a `lax.cond` whose branches write to refs (a KeyError inside JAX).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lowprec_jax import compat
from lowprec_jax.ops.sinks import IndexedSink


def cond(pred: jax.Array, true_fun: Callable, false_fun: Callable, *operands):
    """`jax.lax.cond`; the layers of the branch that runs are observed, the others keep their state.

    The backward pass runs the taken branch once more, as under `jax.checkpoint`.

    Args:
      pred: bool [].
      true_fun: called with `operands` if `pred` holds.
      false_fun: called with them otherwise; must return the same types.
      *operands: pytrees. Everything that is differentiated and every scaling state (with its sinks)
        must be passed here, not closed over.

    Returns:
      What the branch returns.
    """
    leaves, treedef = jax.tree.flatten(operands, is_leaf=_is_sink)
    diff = [i for i, x in enumerate(leaves) if _is_differentiable(x)]
    rest = {i: x for i, x in enumerate(leaves) if i not in diff}

    def run(sinks_too: bool, pred, inputs, others):
        """One branch on all leaves; without sinks nothing is observed."""
        merged = dict(zip(diff, inputs, strict=True)) | others
        if not sinks_too:
            merged = {i: None if _is_sink(x) else x for i, x in merged.items()}
        args = treedef.unflatten([merged[i] for i in range(len(leaves))])
        return lax.cond(pred, lambda: true_fun(*args), lambda: false_fun(*args))

    @jax.custom_vjp
    def branch(pred, inputs, others):
        return run(True, pred, inputs, others)

    def forward(pred, inputs, others):
        return run(False, pred, inputs, others), (pred, inputs, others)

    def backward(residuals, cotangent):
        pred, inputs, others = residuals

        def pull(fun):
            def of_inputs(inputs):
                merged = dict(zip(diff, inputs, strict=True)) | others
                return fun(*treedef.unflatten([merged[i] for i in range(len(leaves))]))

            return jax.vjp(of_inputs, inputs)[1](cotangent)[0]

        return None, lax.cond(pred, lambda: pull(true_fun), lambda: pull(false_fun)), None

    branch.defvjp(forward, backward)
    return branch(pred, [leaves[i] for i in diff], rest)


def _is_sink(x) -> bool:
    return isinstance(x, IndexedSink) or compat.is_ref(x)


def _is_differentiable(x) -> bool:
    return not _is_sink(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
