"""Stock Flax layers with a recipe: same parameters, same initial values, quantized products."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowprec_jax.linen.dot_general import EinsumOp, dot_general_cls
from lowprec_jax.recipes import Recipe, get_recipe


class Dense(nn.Dense):
    """`flax.linen.Dense` whose product follows a recipe.

    Attributes:
      recipe: a recipe or its registered name; decides `dot_general_cls`.

    Raises:
      UserError: an unknown recipe.
    """

    recipe: Recipe | str = "fp8_delayed"

    def __post_init__(self):
        self.dot_general_cls = dot_general_cls(self.recipe)
        super().__post_init__()


class DenseGeneral(nn.DenseGeneral):
    """`flax.linen.DenseGeneral` whose product follows a recipe.

    Attributes:
      recipe: a recipe or its registered name; decides `dot_general_cls`.

    Raises:
      UserError: an unknown recipe.
    """

    recipe: Recipe | str = "fp8_delayed"

    def __post_init__(self):
        self.dot_general_cls = dot_general_cls(self.recipe)
        super().__post_init__()


class Einsum(nn.Einsum):
    """`flax.linen.Einsum` whose product follows a recipe.

    Attributes:
      recipe: a recipe or its registered name.

    Raises:
      UserError: an unknown recipe.
    """

    recipe: Recipe | str = "fp8_delayed"

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        """The product of float `inputs` with the kernel, as `einsum_str` says, plus the bias."""
        if not get_recipe(self.recipe).quantizes:
            return super().__call__(inputs, einsum_str)
        return apply_einsum(self, self.recipe, inputs, einsum_str)


def apply_einsum(
    layer: nn.Einsum, recipe: Recipe | str, inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array:
    """What `layer` computes, with a quantized product; runs inside a call of `layer`.

    `flax.linen.Einsum` calls `jnp.einsum` directly: it has no slot to inject into.

    Args:
      layer: the bound layer, whose parameters are used (or created).
      recipe: a recipe or its name.
      inputs: float array.
      einsum_str: as in the layer's call.

    Raises:
      ValueError: an equation that does not name two operands and the output.
    """
    subscripts = nn.merge_param("einsum_str", layer.einsum_str, einsum_str).replace(" ", "")
    if "->" not in subscripts or subscripts.count(",") != 1:
        raise ValueError(
            f"einsum_str {subscripts!r} must name two operands and the output: 'btd,df->btf'."
        )
    kernel: Any = layer.param("kernel", layer.kernel_init, layer.shape, layer.param_dtype)
    bias, broadcast_shape = None, None
    if layer.use_bias:
        bias_shape, broadcast_shape = layer._get_bias_shape(subscripts, inputs, kernel)
        bias = layer.param("bias", layer.bias_init, bias_shape, layer.param_dtype)
    promote: Any = layer.promote_dtype
    left, right, bias = promote(inputs, kernel, bias, dtype=layer.dtype)
    product = EinsumOp(recipe=recipe)(
        subscripts,
        left,
        right,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
    )
    return product if bias is None else product + jnp.reshape(bias, broadcast_shape)
