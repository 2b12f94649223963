"""`nn.cond` for branches that contain layers with scaling state."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lowprec_jax import ops


def cond(
    pred: jax.Array, true_fun: Callable, false_fun: Callable, module: nn.Module, *operands: Any
) -> Any:
    """`flax.linen.cond` that can be differentiated with layers that observe.

    The layers of the branch that runs are observed, the others keep their state. During
    initialisation both branches run, so that all variables exist.

    Args:
      pred: bool [].
      true_fun: ``true_fun(module, *operands)``, called if `pred` holds.
      false_fun: called otherwise; must return the same types.
      module: the module whose variables the branches use; submodules made in ``setup``, or inside
        the branches under names of their own.
      *operands: pytrees of arrays.

    Returns:
      What the branch returns.

    Differs from: `flax.linen.cond`, which also lifts random streams and mutable collections.
    """
    if module.is_initializing():
        taken, other = true_fun(module, *operands), false_fun(module, *operands)
        return jax.tree.map(lambda a, b: jax.numpy.where(pred, a, b), taken, other)
    unbound, variables = module.unbind()

    def branch(fun: Callable) -> Callable:
        return lambda variables, *xs: unbound.apply(variables, *xs, method=fun)

    return ops.cond(pred, branch(true_fun), branch(false_fun), variables, *operands)
