"""The dry-run table of an NNX model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lowprec_jax.nnx.quantize import layers, op_attribute
from lowprec_jax.ops.plan import Plan, find_matmuls, make_plan, mark_layer
from lowprec_jax.recipes import Rules, assign

# What stock layers have in the attribute that `quantize` replaces.
_STOCK_OPS = {
    "dot_general": lax.dot_general,
    "einsum_op": jnp.einsum,
    "conv_general_dilated": lax.conv_general_dilated,
}


def plan(model: nnx.Module, rules: Rules, *inputs: Any, **kwargs: Any) -> Plan:
    """Shows what `quantize` would do with these rules, without doing it.

    Args:
      model: the model; it is not changed and nothing is computed.
      rules: as in `quantize`.
      *inputs: arguments of a forward pass, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: its keyword arguments (static).

    Returns:
      The plan; ``print`` it.

    Raises:
      UserError: a rule matches no layer, or a recipe is unknown.
    """
    assignments = assign([path for path, _ in layers(model)], rules)
    graphdef, state = nnx.split(model)

    def forward(state, *inputs):
        copy = nnx.merge(graphdef, state)
        for path, layer in layers(copy):
            attribute = op_attribute(layer)
            setattr(layer, attribute, nnx.static(mark_layer(path, _STOCK_OPS[attribute])))
        return jax.tree.leaves(copy(*inputs, **kwargs))

    return make_plan(assignments, find_matmuls(jax.make_jaxpr(forward)(state, *inputs)))
