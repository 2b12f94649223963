"""The dry-run table of an NNX model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lowprec_jax.nnx.quantize import layers, op_attribute
from lowprec_jax.ops.plan import LAYER_MARK, Plan, find_matmuls, make_plan
from lowprec_jax.recipes import Rules, assign


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
            plain = jnp.einsum if attribute == "einsum_op" else lax.dot_general
            setattr(layer, attribute, nnx.static(_marked(path, plain)))
        return jax.tree.leaves(copy(*inputs, **kwargs))

    return make_plan(assignments, find_matmuls(jax.make_jaxpr(forward)(state, *inputs)))


def _marked(path: str, op: Callable) -> Callable:
    """The op inside a jitted function whose name says which layer it belongs to."""

    def call(*args, **kwargs):
        statics = [i for i, x in enumerate(args) if not isinstance(x, jax.Array)]
        arrays = [x for x in args if isinstance(x, jax.Array)]

        def layer(*arrays):
            rest = iter(arrays)
            merged = [args[i] if i in statics else next(rest) for i in range(len(args))]
            return op(*merged, **kwargs)

        layer.__name__ = LAYER_MARK + path
        return jax.jit(layer)(*arrays)

    return call
