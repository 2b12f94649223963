"""The convolution layer of NNX with a recipe, and its op."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lowprec_jax import ops
from lowprec_jax.nnx.layers import DEFAULT_RECIPE
from lowprec_jax.nnx.sites import Site
from lowprec_jax.recipes import Recipe


class ConvGeneralDilated(Site):
    """A callable like `jax.lax.conv_general_dilated`, computed as a recipe says.

    Fits the ``conv_general_dilated`` argument of `nnx.Conv`. One per layer.
    """

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        **kwargs: Any,
    ) -> jax.Array:
        """See `lowprec_jax.ops.conv_general_dilated`."""
        return ops.conv_general_dilated(
            lhs, rhs, window_strides, padding, recipe=self.recipe, state=self.state, **kwargs
        )


class Conv(nnx.Conv):
    """`nnx.Conv` computed as a recipe says; parameters and their initial values are the same.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      kernel_size: shape of the window.
      *args: as in `nnx.Conv`.
      recipe: a recipe or its name.
      rngs: random keys of the initialisers.
      **kwargs: as in `nnx.Conv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        recipe: Recipe | str = DEFAULT_RECIPE,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        op = ConvGeneralDilated(recipe)
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            *args,
            conv_general_dilated=op,
            rngs=rngs,
            **kwargs,
        )
