"""`nnx.cond` for branches that contain layers with scaling state."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lowprec_jax import ops
from lowprec_jax.nnx.micro_batches import kinds_of


def cond(pred: jax.Array, true_fun: Callable, false_fun: Callable, *operands: Any) -> Any:
    """`nnx.cond` that can be differentiated with layers that observe.

    The layers of the branch that runs are observed, the others keep their state. What a branch
    changes in a module (BatchNorm statistics, random keys) is changed after the call. The backward
    pass runs the branch once more, so that its observations are counted more often.

    Args:
      pred: bool [].
      true_fun: called with `operands` if `pred` holds.
      false_fun: called with them otherwise; must return the same types.
      *operands: modules and pytrees of arrays. A module whose layers run in a branch must be among
        them, not closed over.

    Returns:
      What the branch returns.
    """
    nodes, arrays, others = kinds_of(operands)
    graphdef, variables = nnx.split(nodes)

    def branch(fun: Callable) -> Callable:
        def run(variables, arrays):
            inner = nnx.merge(graphdef, variables, copy=True)  # of the trace of the branch
            merged = {**inner, **arrays, **others}
            out = fun(*(merged[i] for i in range(len(operands))))
            return out, nnx.state(inner)

        return run

    out, changed = ops.cond(pred, branch(true_fun), branch(false_fun), variables, arrays)
    nnx.update(nodes, changed)
    return out
