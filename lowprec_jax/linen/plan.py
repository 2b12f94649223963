"""The dry-run table of a Linen model."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lowprec_jax.linen.quantized_model import Quantized, layers
from lowprec_jax.ops.plan import Plan, find_matmuls, make_plan, mark_layer
from lowprec_jax.recipes import Rules, assign


def plan(model: nn.Module, rules: Rules, *inputs: Any, **kwargs: Any) -> Plan:
    """Shows what `quantize` would do with these rules, without doing it.

    Args:
      model: the model, quantized or not; nothing is computed.
      rules: as in `quantize`.
      *inputs: arguments of a forward pass, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: its keyword arguments (static).

    Returns:
      The plan; ``print`` it.

    Raises:
      UserError: a rule matches no layer, or a recipe is unknown.
    """
    model = model.model if isinstance(model, Quantized) else model
    paths = {layer.path for layer in layers(model, *inputs, **kwargs)}
    assignments = assign(sorted(paths), rules)

    def mark(next_fun: Callable, args: Any, call_kwargs: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        if context.method_name != "__call__" or path not in paths:
            return next_fun(*args, **call_kwargs)
        return mark_layer(path, lambda *xs: next_fun(*xs, **call_kwargs))(*args)

    variables = jax.eval_shape(lambda *xs: model.init(jax.random.key(0), *xs, **kwargs), *inputs)

    def forward(variables: Any, *inputs: Any) -> list[jax.Array]:
        with nn.intercept_methods(mark):
            return jax.tree.leaves(model.apply(variables, *inputs, **kwargs))

    return make_plan(assignments, find_matmuls(jax.make_jaxpr(forward)(variables, *inputs)))
