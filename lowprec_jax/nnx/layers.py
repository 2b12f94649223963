"""Linear layers with a recipe: the stock Flax layers with their matmul replaced."""

from collections.abc import Sequence

from flax import nnx

from lowprec_jax.nnx.sites import DotGeneral, EinsumOp
from lowprec_jax.recipes import Recipe

DEFAULT_RECIPE = "fp8_delayed"


class Linear(nnx.Linear):
    """`nnx.Linear` computed as a recipe says; parameters and their initial values are the same.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      recipe: a recipe or its name.
      rngs: random keys of the initialisers.
      **kwargs: as in `nnx.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: Recipe | str = DEFAULT_RECIPE,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(
            in_features, out_features, dot_general=DotGeneral(recipe), rngs=rngs, **kwargs
        )


class LinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` computed as a recipe says. Arguments as there, and `recipe`."""

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        recipe: Recipe | str = DEFAULT_RECIPE,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(
            in_features, out_features, dot_general=DotGeneral(recipe), rngs=rngs, **kwargs
        )


class Einsum(nnx.Einsum):
    """`nnx.Einsum` computed as a recipe says. Arguments as there, and `recipe`."""

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        recipe: Recipe | str = DEFAULT_RECIPE,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(
            einsum_str,
            tuple(kernel_shape),
            None if bias_shape is None else tuple(bias_shape),
            einsum_op=EinsumOp(recipe),
            rngs=rngs,
            **kwargs,
        )
