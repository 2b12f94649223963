"""The convolution layer of Linen with a recipe, and its call site."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from lowprec_jax import ops
from lowprec_jax.linen.dot_general import Injection, state_of
from lowprec_jax.recipes import Recipe, get_recipe


class ConvGeneralDilated(nn.Module):
    """`lowprec_jax.ops.conv_general_dilated` with its scaling state.

    Attributes:
      recipe: a recipe or its registered name.
    """

    recipe: Recipe | str = "fp8_delayed"

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        **kwargs: Any,
    ) -> jax.Array:
        """A convolution of float arrays; arguments as in `jax.lax.conv_general_dilated`.

        Raises:
          UserError: the variables given to `apply` have no scaling state for this layer.
        """
        return ops.conv_general_dilated(
            lhs, rhs, window_strides, padding, recipe=self.recipe, state=state_of(self), **kwargs
        )


def conv_general_dilated_cls(recipe: Recipe | str) -> Injection:
    """What ``nn.Conv(conv_general_dilated_cls=...)`` takes.

    Raises:
      UserError: an unknown recipe.
    """
    return Injection(ConvGeneralDilated, get_recipe(recipe))


class Conv(nn.Conv):
    """`flax.linen.Conv` whose convolution follows a recipe.

    Attributes:
      recipe: a recipe or its registered name; decides `conv_general_dilated_cls`.

    Raises:
      UserError: an unknown recipe.
    """

    recipe: Recipe | str = "fp8_delayed"

    def __post_init__(self):
        self.conv_general_dilated_cls = conv_general_dilated_cls(self.recipe)
        super().__post_init__()
